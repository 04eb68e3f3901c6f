// Launches kernels. A kernel is a struct
//
//   struct Kernel {
//     struct Params { … };  // passed by value
//     static constexpr int kThreads = 128;   // of a block
//     static constexpr int kMinBlocks = 1;   // on a multiprocessor, at least
//     ERCN_DEVICE static void run(const Params& params, unsigned char* shared);
//   };
#pragma once

#include <array>
#include <atomic>
#include <typeinfo>

#include <arch/base.h>
#include <arch/stream.h>

#include "registry.h"

namespace ercn::arch {

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    entry(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Kernel::run(params, shared);
}

template <typename Kernel>
inline KernelRecord record{typeid(Kernel), reinterpret_cast<const void*>(&entry<Kernel>)};

template <typename Kernel>
void launch(const typename Kernel::Params& params, Grid grid, int shared_bytes, const Stream& stream) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr int kDefaultLimit = 48 << 10, kDevices = 64;
  if (shared_bytes > kDefaultLimit) {
    static std::array<std::atomic<bool>, kDevices> raised;  // the limit of each device
    std::atomic<bool>& done = raised[stream.device() % kDevices];
    if (!done.load(std::memory_order_acquire)) {
      check(
          cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, stream.shared_limit()),
          __FILE__, __LINE__);
      done.store(true, std::memory_order_release);
    }
  }
  entry<Kernel><<<dim3(grid.x, grid.y, grid.z), Kernel::kThreads, shared_bytes, stream.get()>>>(params);
  check(cudaGetLastError(), __FILE__, __LINE__);
  record<Kernel>.launched(Kernel::kThreads, shared_bytes);
}

}  // namespace ercn::arch
