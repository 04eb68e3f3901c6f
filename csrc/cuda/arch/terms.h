// fp32 as the sum of two shorter terms, and products of such terms.
#pragma once

#include <arch/convert.h>
#include <arch/mma.h>

namespace ercn {

ERCN_DEVICE bool finite(float x) { return (arch::float_bits(x) & 0x7f800000) != 0x7f800000; }

// The low term x - high where `high` is x rounded; 0 where that is infinite.
ERCN_DEVICE float rest(float x, float high) { return finite(high) ? x - high : 0.0f; }

// Fragments of fp32 elements as TF32 terms. The low term of what is not finite is NaN. Tensor cores cut the last of its
// 12 bits, which errs as much as rounding would.
template <int N>
struct Terms {
  uint32_t high[N], low[N];

  ERCN_DEVICE void set(int i, float x) {
    const float term = arch::round_tf32(x);
    high[i] = arch::float_bits(term);
    low[i] = arch::float_bits(x - term);
  }
};

// d += A · B of 8 TF32 columns of A from terms. Where a factor is not finite, the products with a low term are NaN and
// are left out: the product of the high terms is right.
ERCN_DEVICE void mma_terms(float (&d)[4], const Terms<4>& a, const Terms<2>& b) {
  float small[4] = {};
  arch::mma<arch::tf32>(small, a.low, b.high);
  arch::mma<arch::tf32>(small, a.high, b.low);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += small[i] == small[i] ? small[i] : 0.0f;
  arch::mma<arch::tf32>(d, a.high, b.high);
}

// d += A · B of fp32 factors, in one product of TF32 or in three.
template <bool EXACT>
ERCN_DEVICE void mma_fp32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  if constexpr (EXACT) {
    Terms<4> fa;
    Terms<2> fb;
    for (int i = 0; i < 4; ++i) fa.set(i, a[i]);
    for (int i = 0; i < 2; ++i) fb.set(i, b[i]);
    mma_terms(d, fa, fb);
  } else {
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; ++i) fa[i] = arch::float_bits(a[i]);
    for (int i = 0; i < 2; ++i) fb[i] = arch::float_bits(b[i]);
    arch::mma<arch::tf32>(d, fa, fb);
  }
}

}  // namespace ercn
