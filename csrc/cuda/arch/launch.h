// Starts kernels. A kernel is a struct
//
//   struct Kernel {
//     struct Params { … };                                    // passed by value
//     static constexpr int kThreads = 128, kMinBlocks = 1;    // threads of a block, blocks that must fit a multiprocessor
//     ERCN_DEVICE static void run(const Params& params, unsigned char* shared);
//   };
//
// In tests/cuda_emulator, arch/launch.h takes this file's place.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>

#include <arch/base.h>

// Where the launchers are registered: STABLE_TORCH_LIBRARY_IMPL(ERCN_LIBRARY, ERCN_DISPATCH_KEY, m).
#define ERCN_LIBRARY ercn_cuda
#define ERCN_DISPATCH_KEY CUDA

namespace ercn::arch {

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    entry(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Kernel::run(params, shared);
}

// Makes a tensor's device current while it lives, and holds the caller's stream there.
class Stream {
 public:
  explicit Stream(const torch::stable::Tensor& x) : device_(x.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  int device() const { return device_; }
  cudaStream_t get() const { return stream_; }
  int multiprocessors() const {
    int count;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
    return count;
  }

 private:
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

template <typename Kernel>
void launch(const typename Kernel::Params& params, Grid grid, int shared_bytes, const Stream& stream) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr int kWithoutLeave = 48 << 10, kDevices = 64;
  if (shared_bytes > kWithoutLeave) {
    static std::array<std::atomic<bool>, kDevices> raised;  // of each device
    std::atomic<bool>& done = raised[stream.device() % kDevices];
    if (!done.load(std::memory_order_acquire)) {
      int most;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device()));
      STD_CUDA_CHECK(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
      done.store(true, std::memory_order_release);
    }
  }
  entry<Kernel><<<dim3(grid.x, grid.y, grid.z), Kernel::kThreads, shared_bytes, stream.get()>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace ercn::arch
