// What was built, and what the compiler and the device make of each kernel, as ercn_native::cuda_info and
// …::cuda_kernels.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "../json.h"
#include "registry.h"

namespace ercn {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

std::string cuda_info() {
  JsonObject info;
  info.add("cuda", std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10));
  info.add("archs", ERCN_STRING(ERCN_ARCHS));
  info.add("flags", ERCN_STRING(ERCN_FLAGS));
  return info.str();
}

// Of the current device; every kernel must have been launched for its occupancy to be known. What is compiled for
// another architecture alone, as Hopper's kernels are, has no attributes but "absent", the reason.
void add_attributes(const KernelRecord& record, JsonObject& kernel) {
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, record.function);
  if (error == cudaErrorInvalidDeviceFunction || error == cudaErrorNoKernelImageForDevice) {
    cudaGetLastError();  // else the next launch is blamed for it
    kernel.add("absent", cudaGetErrorString(error));
    return;
  }
  check(error);
  kernel.add("registers", found.numRegs);
  kernel.add("local_bytes", found.localSizeBytes);
  kernel.add("static_shared_bytes", found.sharedSizeBytes);
  kernel.add("max_threads", found.maxThreadsPerBlock);
  kernel.add("binary_version", found.binaryVersion);
  if (record.launches > 0) {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, record.function, record.threads, record.shared));
    kernel.add("blocks_per_multiprocessor", blocks);
  }
}

// Every kernel: name, launches so far, and threads and shared memory of the last launch.
std::string cuda_kernels(bool attributes) {
  JsonList all;
  for (const KernelRecord* record : kernel_records()) {
    JsonObject kernel;
    kernel.add("name", record->name);
    kernel.add("launches", record->launches.load());
    kernel.add("threads", record->threads.load());
    kernel.add("dynamic_shared_bytes", record->shared.load());
    if (attributes) add_attributes(*record, kernel);
    all.add_json(kernel.str());
  }
  return all.str();
}

}  // namespace
}  // namespace ercn

STABLE_TORCH_LIBRARY_FRAGMENT(ercn_native, m) {
  m.def("cuda_info() -> str");
  m.def("cuda_kernels(bool attributes) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ercn_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_info", TORCH_BOX(&ercn::cuda_info));
  m.impl("cuda_kernels", TORCH_BOX(&ercn::cuda_kernels));
}
