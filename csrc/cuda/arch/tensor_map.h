// Tensor maps: what the copy engine knows of a tensor in device memory. In tests/cuda_emulator, arch/tensor_map.h takes
// this file's place.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>
#include <type_traits>

#include <arch/elements.h>

namespace ercn::arch {

using TensorMap = CUtensorMap;  // 128 bytes, by value in a kernel's Params

enum class Swizzle { kNone, k32, k64, k128 };

// In stream.cpp.
TensorMap encode_tensor_map(
    CUtensorMapDataType type, int rank, const void* address, const int64_t* sizes, const int64_t* strides,
    const int* box, Swizzle swizzle);

// Of a tensor whose dimension 0 is contiguous. Dimension 0 comes first; strides are those of dimensions 1, …, in bytes.
// The address and strides are multiples of 16, sides of the box at most 256, and with a swizzle the box's dimension 0
// fits it.
template <typename Element, int RANK>
TensorMap make_tensor_map(
    const void* address, const std::array<int64_t, RANK>& sizes, const std::array<int64_t, RANK - 1>& strides,
    const std::array<int, RANK>& box, Swizzle swizzle) {
  constexpr CUtensorMapDataType kType = std::is_same_v<Element, bf16>   ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                        : std::is_same_v<Element, fp16> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  return encode_tensor_map(kType, RANK, address, sizes.data(), strides.data(), box.data(), swizzle);
}

}  // namespace ercn::arch
