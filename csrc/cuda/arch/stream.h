// The caller's stream and its device's attributes. Defined in stream.cpp, for nvcc is slow on torch's headers; the
// emulator has them in its arch/launch.h.
#pragma once

#include <cuda_runtime.h>

#include <memory>

namespace ercn::arch {

// Throws std::runtime_error with CUDA's message and torch's hints.
void check(cudaError_t error, const char* file, int line);

int attribute(cudaDeviceAttr name, int device);

// 90 for a tensor on a device of 9.0.
template <typename Tensor>
int compute_capability(const Tensor& x) {
  const int device = x.get_device_index();
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

// The caller's stream on a tensor's device, which is current during the object's lifetime.
class Stream {
 public:
  template <typename Tensor>
  explicit Stream(const Tensor& x) : Stream(static_cast<int>(x.get_device_index())) {}
  explicit Stream(int device);

  int device() const { return device_; }
  cudaStream_t get() const { return stream_; }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount, device_); }
  int l2_bytes() const { return attribute(cudaDevAttrL2CacheSize, device_); }
  // The most bytes of shared memory of a block.
  int shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device_); }

 private:
  int device_;
  std::unique_ptr<void, void (*)(void*)> guard_;
  cudaStream_t stream_;
};

}  // namespace ercn::arch
