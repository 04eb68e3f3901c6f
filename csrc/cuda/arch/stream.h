// The caller's stream, and what is known of its device. In stream.cpp, because torch's headers take nvcc longer than a
// kernel does. In tests/cuda/emulator, arch/launch.h has it.
#pragma once

#include <cuda_runtime.h>

#include <memory>

namespace ercn::arch {

// Throws std::runtime_error with CUDA's words and torch's hints.
void check(cudaError_t error, const char* file, int line);

int attribute(cudaDeviceAttr of, int device);

// Of a tensor's device, 90 for 9.0.
template <typename Tensor>
int compute_capability(const Tensor& x) {
  const int device = x.get_device_index();
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

// Makes a tensor's device current while it lives, and holds the caller's stream there.
class Stream {
 public:
  template <typename Tensor>
  explicit Stream(const Tensor& x) : Stream(static_cast<int>(x.get_device_index())) {}
  explicit Stream(int device);

  int device() const { return device_; }
  cudaStream_t get() const { return stream_; }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount, device_); }
  int l2_bytes() const { return attribute(cudaDevAttrL2CacheSize, device_); }
  // Bytes of shared memory that a block may have.
  int shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device_); }

 private:
  int device_;
  std::unique_ptr<void, void (*)(void*)> guard_;
  cudaStream_t stream_;
};

}  // namespace ercn::arch
