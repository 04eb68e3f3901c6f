// Threads, barriers and shuffles. The emulator includes a file of the same name in tests/cuda/emulator/arch instead of
// this one, and so for async.h, convert.h, hopper.h, launch.h, mma.h, tensor_map.h and wgmma.h.
#pragma once

#include <cstdint>

#include <arch/elements.h>
#include <arch/host_device.h>

#ifdef __CUDACC__
#define ERCN_DEVICE __device__ __forceinline__
#else
#define ERCN_DEVICE inline  // for headers of the C++ compiler
#endif

namespace ercn::arch {

struct Grid {
  int x, y = 1, z = 1;
};

#ifdef __CUDACC__

ERCN_DEVICE int thread_index() { return threadIdx.x; }
ERCN_DEVICE int lane_index() { return threadIdx.x % 32; }
ERCN_DEVICE int warp_index() { return threadIdx.x / 32; }
// warp_index() as a value that the compiler knows to be uniform, so that no branch on it diverges. By all lanes.
ERCN_DEVICE int uniform_warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }
ERCN_DEVICE Grid block_index() {
  return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
}
ERCN_DEVICE Grid grid_blocks() {
  return {static_cast<int>(gridDim.x), static_cast<int>(gridDim.y), static_cast<int>(gridDim.z)};
}

ERCN_DEVICE void sync_threads() { __syncthreads(); }
ERCN_DEVICE void sync_warp() { __syncwarp(); }

// Barriers 1 to 15 of `threads` threads, a multiple of 32; 0 is sync_threads'.
ERCN_DEVICE void named_barrier(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// For 32-bit types, by all lanes of a warp.
template <typename T>
ERCN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
ERCN_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

ERCN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes at an address that is a multiple of 16.
struct alignas(16) Vector16 {
  uint32_t words[4];
};
ERCN_DEVICE Vector16 load_16(const void* pointer) {
  const uint4 v = *static_cast<const uint4*>(pointer);
  return {{v.x, v.y, v.z, v.w}};
}
ERCN_DEVICE void store_16(void* pointer, const Vector16& v) {
  *static_cast<uint4*>(pointer) = make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]);
}

#endif  // __CUDACC__

}  // namespace ercn::arch
