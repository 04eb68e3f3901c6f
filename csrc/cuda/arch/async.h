// Copies from device to shared memory that run beside the threads (sm_80). In tests/cuda_emulator, arch/async.h takes
// this file's place.
#pragma once

#include <arch/base.h>

namespace ercn::arch {

// BYTES (4, 8 or 16) from device memory to shared memory, both aligned to BYTES; zeros, and nothing read, where not
// `valid`.
template <int BYTES>
ERCN_DEVICE void cp_async(void* shared, const void* global, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  const uint32_t read = valid ? BYTES : 0;
  if constexpr (BYTES == 16) {  // past the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(BYTES),
                 "r"(read)
                 : "memory");
  }
}

// The first `bytes` (0 to 16) of 16, and zeros; both addresses multiples of 16.
ERCN_DEVICE void cp_async_first(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Closes the group of this thread's copies since the last commit.
ERCN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last N groups of this thread have arrived; others' copies need a barrier after it.
template <int N>
ERCN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace ercn::arch
