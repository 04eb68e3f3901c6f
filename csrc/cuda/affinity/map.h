#pragma once
// A tensor [B, C, N] of any strides and floating dtype, as kernels read it.
#include <arch/convert.h>

namespace ercn {

struct Map {
  const void* data;
  Float type;
  int64_t stride_b, stride_c, stride_n;  // in elements
};

ERCN_DEVICE float read(const Map& map, int64_t b, int64_t c, int64_t n) {
  const int64_t at = b * map.stride_b + c * map.stride_c + n * map.stride_n;
  if (map.type == Float::fp32) return static_cast<const float*>(map.data)[at];
  if (map.type == Float::bf16) return arch::to_float(static_cast<const arch::bf16*>(map.data)[at]);
  return arch::to_float(static_cast<const arch::fp16*>(map.data)[at]);
}

}  // namespace ercn
