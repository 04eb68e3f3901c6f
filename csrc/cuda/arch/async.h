// Copies from device to shared memory that run beside the threads (sm_80). In tests/cuda/emulator, arch/async.h takes
// this file's place.
#pragma once

#include <arch/base.h>

namespace ercn::arch {

// 16 bytes from device memory to shared memory, past the L1 cache; of fewer `bytes`, those and zeros. Both addresses
// are multiples of 16.
ERCN_DEVICE void cp_async(void* shared, const void* global, int bytes = 16) {
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
