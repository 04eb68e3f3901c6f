#pragma once
// The threads and the memory of a call: tasks on workers, and a workspace cut into pieces.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "affinity/affinity.h"

namespace ercn {

inline int64_t max_workers() { return torch::stable::get_num_threads(); }

// Tasks 0, 1, … in shares of consecutive tasks, one for each worker. Any thread may take from any share.
class Shares {
 public:
  // Every worker gets at least `grain` tasks, unless there is only one.
  explicit Shares(int64_t tasks, int64_t grain = 1)
      : tasks_(tasks), taken_(std::min(max_workers(), (tasks + grain - 1) / grain)) {}

  int64_t workers() const { return taken_.size(); }
  int64_t first(int64_t worker) const { return worker * tasks_ / workers(); }
  int64_t width(int64_t worker) const { return first(worker + 1) - first(worker); }

  // Takes the next number of a worker's share, counted from 0; -1 where `limit` numbers are taken already.
  int64_t take(int64_t worker, int64_t limit) {
    std::atomic<int64_t>& taken = taken_[worker].count;
    int64_t next = taken.load(std::memory_order_relaxed);
    do {
      if (next >= limit) return -1;
    } while (!taken.compare_exchange_weak(next, next + 1, std::memory_order_relaxed));
    return next;
  }

  // Runs work(worker) for every worker. There may be fewer threads than workers.
  template <typename F>
  void run(const F& work) const {
    torch::stable::parallel_for(0, workers(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) work(worker);
    });
  }

 private:
  struct alignas(64) Counter {  // in its own cache line
    std::atomic<int64_t> count{0};
  };
  const int64_t tasks_;
  std::vector<Counter> taken_;
};

// Runs body(task, worker) for every task. A worker runs its own share in order, then helps the others. A second loop
// over the same tasks runs them on the same threads, whose caches may still hold their data.
template <typename F>
void for_each_task(int64_t tasks, const F& body, int64_t grain = 1) {
  if (max_workers() == 1 || tasks <= grain) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  Shares shares(tasks, grain);
  shares.run([&](int64_t worker) {
    for (int64_t i = 0; i < shares.workers(); ++i) {
      const int64_t owner = (worker + i) % shares.workers(), first = shares.first(owner), width = shares.width(owner);
      for (int64_t task; (task = shares.take(owner, width)) >= 0;) body(first + task, worker);
    }
  });
}

// Scratch of every worker.
template <typename T>
struct WorkerScratch {
  T* memory = nullptr;
  int64_t stride = 0;

  T* of(int64_t worker) const { return memory + worker * stride; }
};

// Uninitialized memory of torch's allocator, cut into pieces on cache lines of their own. The pointers to the pieces
// are set when all are reserved.
class Workspace {
 public:
  Workspace() { pieces_.reserve(24); }  // more than any call has

  template <typename T>
  void reserve(T*& piece, int64_t elements) {
    pieces_.push_back({reinterpret_cast<void**>(&piece), round_up(elements * static_cast<int64_t>(sizeof(T)), kLine)});
  }
  template <typename T>
  void reserve(WorkerScratch<T>& scratch, int64_t elements) {
    scratch.stride = round_up(elements, kLine / static_cast<int64_t>(sizeof(T)));
    reserve(scratch.memory, scratch.stride * max_workers());
  }

  void allocate(const torch::stable::Tensor& like) {
#if defined(__SANITIZE_ADDRESS__)  // a tensor for each piece, so that an access beyond it shows
    for (const auto& [piece, bytes] : pieces_) *piece = new_memory(like, bytes);
#else
    int64_t total = 0;
    for (const auto& [piece, bytes] : pieces_) total += bytes;
    char* next = new_memory(like, total);
    for (const auto& [piece, bytes] : pieces_) *piece = next, next += bytes;
#endif
  }

 private:
  static constexpr int64_t kLine = 64;

  char* new_memory(const torch::stable::Tensor& like, int64_t bytes) {
    tensors_.push_back(torch::stable::new_empty(like, {bytes + kLine}, torch::headeronly::ScalarType::Byte));
    char* const memory = static_cast<char*>(tensors_.back().mutable_data_ptr());
    return memory + (-reinterpret_cast<intptr_t>(memory) & (kLine - 1));
  }

  std::vector<std::pair<void**, int64_t>> pieces_;
  std::vector<torch::stable::Tensor> tensors_;
};

}  // namespace ercn
