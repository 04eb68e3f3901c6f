#pragma once
// Which thread runs which pair of blocks, and when.
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "affinity.h"
#include "schedule.h"

namespace ercn {

// Every pair of blocks of every image. Each worker has a share of the places of a round, the same in every round:
// blocks move by one place at most, so their sums stay in one core's cache. Before a pair its blocks must have finished
// the round before. Who must wait runs tasks of earlier rounds that nobody has begun, so there is no deadlock, whatever
// the number of threads, and nobody idles for long. Such help is nested at most as deep as there are workers.
template <typename E, typename T>
class Pairs {
 public:
  Pairs(const AffinityKernel<E, T>& kernel, const std::vector<AffinityImage<E, T>>& images)
      : kernel_(kernel),
        images_(images),
        schedule_{round_up(images[0].N, kBlock) / kBlock},
        tasks_(schedule_.tasks_per_round() * images.size()),
        begun_(torch::stable::get_num_threads()),
        finished_(schedule_.ring() * images.size()) {}

  void run() {
    torch::stable::parallel_for(0, begun_.size(), 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<Scratch> scratch(new Scratch);
      for (int64_t worker = begin; worker < end; ++worker) {
        while (next(worker, schedule_.ring(), *scratch) || help(schedule_.ring(), *scratch)) continue;
      }
    });
  }

 private:
  struct alignas(64) Counter {  // in its own cache line
    std::atomic<int64_t> tasks{0};
  };
  struct alignas(64) Scratch {  // a vector in two cache lines costs two accesses
    T numbers[2 * kBlock * kBlock];
  };

  // Runs the next task of a worker's share, if there is one in a round below `limit`.
  bool next(int64_t worker, int64_t limit, Scratch& scratch) {
    const int64_t workers = begun_.size();
    const int64_t first = worker * tasks_ / workers, width = (worker + 1) * tasks_ / workers - first;
    int64_t task = begun_[worker].tasks.load(std::memory_order_relaxed);
    do {
      if (task >= limit * width) return false;
    } while (!begun_[worker].tasks.compare_exchange_weak(task, task + 1, std::memory_order_relaxed));
    // The ends of a share need what the neighbouring share did the round before: they come in the middle.
    const int64_t round = task / width, place = first + (task + width / 2) % width;
    const int64_t b = place / schedule_.tasks_per_round();
    const auto [i, j] = schedule_.pair(round, place % schedule_.tasks_per_round());
    std::atomic<int64_t>* const finished = finished_.data() + b * schedule_.ring();
    for (const int64_t block : {i, j}) {
      while (finished[block].load(std::memory_order_acquire) < round) {
        if (!help(round, scratch)) std::this_thread::yield();
      }
    }
    if (j < schedule_.blocks) kernel_.pair(images_[b], i, j, scratch.numbers);
    finished[i].store(round + 1, std::memory_order_release);
    // Not twice: another thread may have finished the next round of the block in between.
    if (j != i) finished[j].store(round + 1, std::memory_order_release);
    return true;
  }

  bool help(int64_t limit, Scratch& scratch) {
    for (size_t worker = 0; worker < begun_.size(); ++worker) {
      if (next(worker, limit, scratch)) return true;
    }
    return false;
  }

  const AffinityKernel<E, T>& kernel_;
  const std::vector<AffinityImage<E, T>>& images_;
  const TriangleSchedule schedule_;
  const int64_t tasks_;                         // of a round
  std::vector<Counter> begun_;                  // of each worker's share
  std::vector<std::atomic<int64_t>> finished_;  // rounds, of each block of each image
};

}  // namespace ercn
