// The Python module ercn._cuda: what was built, and what the compiler and the device make of each kernel. The operators
// register themselves when it is loaded, through the LibTorch stable ABI.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "registry.h"

#define ERCN_STRING_(...) #__VA_ARGS__
#define ERCN_STRING(...) ERCN_STRING_(__VA_ARGS__)

namespace py = pybind11;

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

py::dict build_info() {
  py::dict info;
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["archs"] = ERCN_STRING(ERCN_ARCHS);
  info["flags"] = ERCN_STRING(ERCN_FLAGS);
  return info;
}

py::dict described(const ercn::KernelRecord& record) {
  py::dict kernel;
  kernel["name"] = record.name;
  kernel["launches"] = record.launches.load();
  kernel["threads"] = record.threads.load();
  kernel["dynamic_shared_bytes"] = record.shared.load();
  return kernel;
}

py::list kernels() {
  py::list all;
  for (const ercn::KernelRecord* record : ercn::kernel_records()) all.append(described(*record));
  return all;
}

// Of the current device; every kernel must have been launched for its occupancy to be known. What is compiled for
// another architecture alone, as Hopper's kernels are, has no attributes but "absent", the reason.
py::list kernel_attributes() {
  py::list all;
  for (const ercn::KernelRecord* record : ercn::kernel_records()) {
    py::dict kernel = described(*record);
    all.append(kernel);
    cudaFuncAttributes found;
    const cudaError_t error = cudaFuncGetAttributes(&found, record->function);
    if (error == cudaErrorInvalidDeviceFunction || error == cudaErrorNoKernelImageForDevice) {
      cudaGetLastError();  // else the next launch is blamed for it
      kernel["absent"] = cudaGetErrorString(error);
      continue;
    }
    check(error);
    kernel["registers"] = found.numRegs;
    kernel["local_bytes"] = found.localSizeBytes;
    kernel["static_shared_bytes"] = found.sharedSizeBytes;
    kernel["max_threads"] = found.maxThreadsPerBlock;
    kernel["binary_version"] = found.binaryVersion;
    if (record->launches > 0) {
      int blocks = 0;
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, record->function, record->threads, record->shared));
      kernel["blocks_per_multiprocessor"] = blocks;
    }
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA part of ercn; importing it also registers the operators torch.ops.ercn_native.*_cuda";
  m.def("build_info", &build_info, "CUDA runtime, compute capabilities and flags that it was built with.");
  m.def("kernels", &kernels, "Every kernel: name, launches so far, and threads and shared memory of the last launch.");
  m.def("kernel_attributes", &kernel_attributes,
        "kernels() with registers, local memory and occupancy on the current device, or with the reason why a kernel "
        "is absent there; RuntimeError without a device.");
}
