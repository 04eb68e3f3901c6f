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

inline int attribute(cudaDeviceAttr of, int device) {
  int value;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, of, device));
  return value;
}

// Of a tensor's device, 90 for 9.0.
inline int compute_capability(const torch::stable::Tensor& x) {
  const int device = x.get_device_index();
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
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
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount, device_); }
  // Bytes of shared memory that a block may have.
  int shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device_); }

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
      STD_CUDA_CHECK(
          cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, stream.shared_limit()));
      done.store(true, std::memory_order_release);
    }
  }
  entry<Kernel><<<dim3(grid.x, grid.y, grid.z), Kernel::kThreads, shared_bytes, stream.get()>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  record<Kernel>.launched(Kernel::kThreads, shared_bytes);
}

}  // namespace ercn::arch
