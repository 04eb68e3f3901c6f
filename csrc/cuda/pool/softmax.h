#pragma once
// The functions of the pool that are not products.
#include <arch/convert.h>

#include <cmath>

namespace ercn::pool {

constexpr float kLog2E = 1.4426950408889634f;

// e^x for x ≤ 0, to |x| · 2^-24 and 2 ulp; exactly 0 for -Inf.
ERCN_DEVICE float exp_fast(float x) { return arch::exp2_fast(x * kLog2E); }

struct Activations {
  float t, gate;  // tanh v, σ(u)
};

// Both to a few ulp of 1, absolutely, on two exponentials and one reciprocal; NaN stays NaN, ±Inf saturates.
ERCN_DEVICE Activations activate(float v, float u) {
  const float a = arch::exp2_fast(-2 * kLog2E * fabsf(v)), b = arch::exp2_fast(-kLog2E * fabsf(u));
  const float inverse = arch::reciprocal_fast((1 + a) * (1 + b));
  return {copysignf((1 - a) * (1 + b) * inverse, v), (u < 0 ? b : 1) * (1 + a) * inverse};
}

// tanh(v) · σ(u), likewise.
ERCN_DEVICE float gated(float v, float u) {
  const float a = arch::exp2_fast(-2 * kLog2E * fabsf(v)), b = arch::exp2_fast(-kLog2E * fabsf(u));
  return copysignf((1 - a) * (u < 0 ? b : 1) * arch::reciprocal_fast((1 + a) * (1 + b)), v);
}

}  // namespace ercn::pool
