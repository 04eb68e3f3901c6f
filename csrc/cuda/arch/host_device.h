// Index arithmetic for host and device; tests check it without a GPU.
#pragma once

#ifdef __CUDACC__
#define ERCN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ERCN_HOST_DEVICE inline
#endif

namespace ercn::arch {

template <typename Integer>
ERCN_HOST_DEVICE constexpr Integer divide_up(Integer a, Integer b) {
  return (a + b - 1) / b;
}

template <typename Integer>
ERCN_HOST_DEVICE constexpr Integer round_up(Integer a, Integer b) {
  return divide_up(a, b) * b;
}

// Offset of a byte in a tile of rows of 128 bytes, whose units of 16 or 32 bytes are permuted within each row: a column
// of units of 8 (4) rows is read without bank conflicts. With 16 bytes it is the swizzle of tensor maps and wgmma.
template <int UNIT = 16>
ERCN_HOST_DEVICE constexpr int swizzled(int row, int byte) {
  return row * 128 + (byte ^ (row & (128 / UNIT - 1)) * UNIT);
}

}  // namespace ercn::arch
