#pragma once
#include <cstdint>

namespace ercn {

// The triangle of blocks i <= j as rounds in which every block occurs once, so that the tasks of a round share nothing
// and each block meets its partners in an order that does not depend on threads. With `ring` odd, round r pairs the
// blocks with i + j = r (mod ring): the center c = r / 2 (mod ring) with itself, and c + p with c - p for p = 1, 2, …
// The next round's center is a block of this round's last pair, so every other round runs backwards: no block moves by
// more than one place from round to round.
struct TriangleSchedule {
  int64_t blocks;

  // An even number of blocks gets an absent partner, number `blocks`.
  int64_t ring() const { return blocks | 1; }
  int64_t tasks_per_round() const { return (ring() + 1) / 2; }

  struct Pair {
    int64_t i, j;
  };
  Pair pair(int64_t round, int64_t task) const {
    const int64_t n = ring(), center = round * ((n + 1) / 2) % n;
    const int64_t apart = round % 2 ? tasks_per_round() - 1 - task : task;
    const int64_t a = (center + apart) % n, b = (center - apart + n) % n;
    return a < b ? Pair{a, b} : Pair{b, a};
  }
};

}  // namespace ercn
