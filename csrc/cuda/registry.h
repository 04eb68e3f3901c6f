#pragma once
// Every kernel of this library, its launches and the last launch's sizes: `ercn bench` prints them, tests read them.
#include <atomic>
#include <cstdint>
#include <string>
#include <typeinfo>
#include <vector>

namespace ercn {

struct KernelRecord {
  std::string name;      // the type that defines it
  const void* function;  // its __global__ function
  std::atomic<int> threads = 0, shared = 0;  // of the last launch: of a block, bytes of dynamic shared memory
  std::atomic<int64_t> launches = 0;

  KernelRecord(const std::type_info& type, const void* entry);
  void launched(int block_threads, int shared_bytes) {
    threads.store(block_threads, std::memory_order_relaxed);
    shared.store(shared_bytes, std::memory_order_relaxed);
    launches.fetch_add(1, std::memory_order_relaxed);
  }
};

// In the order in which the library's files are initialised: every launcher has its record as a static variable.
std::vector<KernelRecord*>& kernel_records();

}  // namespace ercn
