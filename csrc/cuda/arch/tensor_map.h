// Tensor maps: TMA's descriptors of tensors in device memory.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>
#include <type_traits>

#include <arch/elements.h>

namespace ercn::arch {

using TensorMap = CUtensorMap;  // 128 bytes, by value in a kernel's Params

// In stream.cpp.
TensorMap encode_tensor_map(
    CUtensorMapDataType type, int rank, const void* address, const int64_t* sizes, const int64_t* strides,
    const int* box);

// The map of a tensor whose dimension 0, the first in `sizes` and `box`, is contiguous; strides are those of dimensions
// 1, …, in bytes. The address and strides are multiples of 16, the box's sides at most 256, its dimension 0 at most 128
// bytes. Boxes have the 128-byte swizzle in shared memory.
template <typename Element, int RANK>
TensorMap make_tensor_map(
    const void* address, const std::array<int64_t, RANK>& sizes, const std::array<int64_t, RANK - 1>& strides,
    const std::array<int, RANK>& box) {
  constexpr CUtensorMapDataType kType =
      std::is_same_v<Element, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode_tensor_map(kType, RANK, address, sizes.data(), strides.data(), box.data());
}

}  // namespace ercn::arch
