// Tensor maps: what the copy engine knows of a tensor in device memory. In tests/cuda_emulator, arch/tensor_map.h takes
// this file's place.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <array>
#include <string>
#include <type_traits>

#include <arch/elements.h>

namespace ercn::arch {

using TensorMap = CUtensorMap;  // 128 bytes, by value in a kernel's Params

enum class Swizzle { kNone, k32, k64, k128 };

// Of a tensor whose dimension 0 is contiguous. Dimension 0 comes first; strides are those of dimensions 1, …, in bytes.
// The address and strides are multiples of 16, sides of the box at most 256, and with a swizzle the box's dimension 0 fits it.
template <typename Element, int RANK>
TensorMap make_tensor_map(
    const void* address, const std::array<int64_t, RANK>& sizes, const std::array<int64_t, RANK - 1>& strides,
    const std::array<int, RANK>& box, Swizzle swizzle) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    STD_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  constexpr CUtensorMapDataType kType = std::is_same_v<Element, bf16>   ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                        : std::is_same_v<Element, fp16> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  constexpr CUtensorMapSwizzle kSwizzles[] = {
      CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  cuuint64_t extents[RANK], pitches[RANK];
  cuuint32_t sides[RANK], steps[RANK];
  for (int i = 0; i < RANK; ++i) {
    extents[i] = sizes[i], sides[i] = box[i], steps[i] = 1;
    if (i > 0) pitches[i - 1] = strides[i - 1];
  }
  TensorMap map;
  const CUresult result = encode(
      &map, kType, RANK, const_cast<void*>(address), extents, pitches, sides, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      kSwizzles[static_cast<int>(swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with error ", static_cast<int>(result));
  return map;
}

}  // namespace ercn::arch
