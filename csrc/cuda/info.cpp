// ercn_native::cuda_info: how the library was built; …::cuda_kernels: launches, registers and occupancy of each kernel.
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

// On the current device. Occupancy needs the sizes of a launch. A kernel without code for the device, as Hopper's are
// on others, has "absent", the reason, instead of attributes.
void add_attributes(const KernelRecord& record, JsonObject& kernel) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, record.function);
  if (error == cudaErrorInvalidDeviceFunction || error == cudaErrorNoKernelImageForDevice) {
    cudaGetLastError();  // clears it: the next launch would report it
    kernel.add("absent", cudaGetErrorString(error));
    return;
  }
  check(error);
  kernel.add("registers", attributes.numRegs);
  kernel.add("local_bytes", attributes.localSizeBytes);
  kernel.add("static_shared_bytes", attributes.sharedSizeBytes);
  kernel.add("max_threads", attributes.maxThreadsPerBlock);
  kernel.add("binary_version", attributes.binaryVersion);
  if (record.launches > 0) {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, record.function, record.threads, record.shared));
    kernel.add("blocks_per_multiprocessor", blocks);
  }
}

// Every kernel as JSON.
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
