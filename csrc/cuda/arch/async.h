// Asynchronous copies from device to shared memory, cp.async (sm_80).
#pragma once

#include <arch/base.h>

namespace ercn::arch {

// Copies `bytes` bytes and zeros up to 16, past the L1 cache. Both addresses are multiples of 16.
ERCN_DEVICE void cp_async(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Groups this thread's copies since its last commit.
ERCN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last N groups of this thread. A barrier after it makes all threads' copies visible.
template <int N>
ERCN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace ercn::arch
