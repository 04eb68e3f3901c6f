// stream.h and tensor_map.h by torch's C shim and the driver.
#include <arch/stream.h>
#include <arch/tensor_map.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

namespace ercn::arch {

void check(cudaError_t error, const char* file, int line) {
  char* message = nullptr;
  torch_c10_cuda_check_msg(static_cast<int32_t>(error), file, "launch", static_cast<uint32_t>(line), true, &message);
  if (message == nullptr) return;
  const std::string copy(message);
  torch_c10_cuda_free_error_msg(message);
  throw std::runtime_error(copy);
}

int attribute(cudaDeviceAttr name, int device) {
  int value;
  check(cudaDeviceGetAttribute(&value, name, device), __FILE__, __LINE__);
  return value;
}

Stream::Stream(int device)
    : device_(device),
      guard_(nullptr, [](void* guard) { aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard)); }) {
  DeviceGuardHandle guard;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device, &guard));
  guard_.reset(guard);
  // The guard sets the device only where another is current. A thread without a call of the runtime, as autograd's may
  // be, then has no context, without which the driver encodes no tensor map.
  check(cudaSetDevice(device), __FILE__, __LINE__);
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

TensorMap encode_tensor_map(
    CUtensorMapDataType type, int rank, const void* address, const int64_t* sizes, const int64_t* strides,
    const int* box) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
        __FILE__, __LINE__);
    STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  constexpr int kMaxRank = 5;
  cuuint64_t extents[kMaxRank], pitches[kMaxRank];
  cuuint32_t sides[kMaxRank], steps[kMaxRank];
  for (int i = 0; i < rank; ++i) {
    extents[i] = sizes[i], sides[i] = box[i], steps[i] = 1;
    if (i > 0) pitches[i - 1] = strides[i - 1];
  }
  TensorMap map;
  const CUresult result = encode(
      &map, type, rank, const_cast<void*>(address), extents, pitches, sides, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with error ", static_cast<int>(result));
  return map;
}

}  // namespace ercn::arch
