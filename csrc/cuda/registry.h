#pragma once
// The kernels of this library, and how each was launched last: what `ercn bench` prints and tests look at.
#include <atomic>
#include <cstdint>
#include <string>
#include <typeinfo>
#include <vector>

namespace ercn {

struct KernelRecord {
  std::string name;      // the type that defines it
  const void* function;  // its __global__ function
  // Of the last launch, as is shared: its dynamic shared memory in bytes.
  std::atomic<int> threads = 0, shared = 0;
  std::atomic<int64_t> launches = 0;

  KernelRecord(const std::type_info& type, const void* entry);
  void launched(int block_threads, int shared_bytes) {
    threads.store(block_threads, std::memory_order_relaxed);
    shared.store(shared_bytes, std::memory_order_relaxed);
    launches.fetch_add(1, std::memory_order_relaxed);
  }
};

// All of them, in the order in which the library's files were initialised: every launcher has a record as a variable.
std::vector<KernelRecord*>& kernel_records();

}  // namespace ercn
