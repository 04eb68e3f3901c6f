#pragma once
// The schedule of the pairs of blocks on threads.
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "../tasks.h"

namespace ercn {

// The triangle of blocks i <= j in rounds (round-robin tournament). A round has every block once: its tasks share
// nothing, and each block meets its partners in an order that does not depend on threads. With `ring` odd, round r
// pairs the blocks with i + j = r (mod ring): the center c = r / 2 (mod ring) with itself, and c + p with c - p for
// p = 1, 2, … The next round's center is in this round's last pair; every other round runs backwards, so that no block
// moves by more than one place from round to round.
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

// Runs every pair of blocks of every image. Each worker has a share of the places of a round, the same in every round:
// blocks move by one place at most, so their sums stay in one core's cache. A pair starts when its blocks have finished
// the round before. A worker that must wait runs tasks of earlier rounds that nobody has begun: there is no deadlock,
// whatever the number of threads, and nobody idles for long. This help nests at most as deep as there are workers.
template <typename E, typename T>
class Pairs {
 public:
  // `scratch`: what AffinityKernel::pair needs, for every worker.
  Pairs(
      const AffinityKernel<E, T>& kernel, const std::vector<AffinityImage<E, T>>& images,
      const WorkerScratch<T>& scratch)
      : kernel_(kernel),
        images_(images),
        scratch_(scratch),
        schedule_{round_up(images[0].N, kBlock) / kBlock},
        places_(schedule_.tasks_per_round() * images.size()),
        finished_(schedule_.ring() * images.size()) {}

  void run() {
    places_.run([&](int64_t worker) {
      T* const scratch = scratch_.of(worker);
      while (next(worker, schedule_.ring(), scratch) || help(schedule_.ring(), scratch)) continue;
    });
  }

 private:
  // Runs the next task of a worker's share, if there is one in a round below `limit`.
  bool next(int64_t worker, int64_t limit, T* scratch) {
    const int64_t width = places_.width(worker), task = places_.take(worker, limit * width);
    if (task < 0) return false;
    // The ends of a share wait for the neighbouring shares' last round: they come in the middle.
    const int64_t round = task / width, place = places_.first(worker) + (task + width / 2) % width;
    const int64_t b = place / schedule_.tasks_per_round();
    const auto [i, j] = schedule_.pair(round, place % schedule_.tasks_per_round());
    std::atomic<int64_t>* const finished = finished_.data() + b * schedule_.ring();
    for (const int64_t block : {i, j}) {
      while (finished[block].load(std::memory_order_acquire) < round) {
        if (!help(round, scratch)) std::this_thread::yield();
      }
    }
    if (j < schedule_.blocks) kernel_.pair(images_[b], i, j, scratch);
    finished[i].store(round + 1, std::memory_order_release);
    // Not twice: another thread may have finished the next round of the block in between.
    if (j != i) finished[j].store(round + 1, std::memory_order_release);
    return true;
  }

  bool help(int64_t limit, T* scratch) {
    for (int64_t worker = 0; worker < places_.workers(); ++worker) {
      if (next(worker, limit, scratch)) return true;
    }
    return false;
  }

  const AffinityKernel<E, T>& kernel_;
  const std::vector<AffinityImage<E, T>>& images_;
  const WorkerScratch<T>& scratch_;
  const TriangleSchedule schedule_;
  Shares places_;                               // of a round
  std::vector<std::atomic<int64_t>> finished_;  // rounds, of each block of each image
};

}  // namespace ercn
