#pragma once
// The branches of a hidden unit: act(v) of v = V h + b_V, and σ(u) of u = U h + b_U. A backward keeps act(v), from
// which the slope follows; for GELU it keeps v itself.
#include <arch/convert.h>

#include <cmath>
#include <type_traits>

#include "pool/problem.h"
#include "pool/softmax.h"

namespace ercn::pool {

struct Branches {
  float kept, gate;
};

// tanh v and σ(u) to an absolute error of a few ulp of 1, by two exponentials and one reciprocal; NaN stays NaN, ±Inf
// saturates.
ERCN_DEVICE Branches tanh_and_gate(float v, float u) {
  const float a = arch::exp2_fast(-2 * kLog2E * fabsf(v)), b = arch::exp2_fast(-kLog2E * fabsf(u));
  const float inverse = arch::reciprocal_fast((1 + a) * (1 + b));
  return {copysignf((1 - a) * (1 + b) * inverse, v), (u < 0 ? b : 1) * (1 + a) * inverse};
}

// The same with tanh to a few ulp of itself, by a series where v is small: 1 - e^(-2 |v|) cancels there.
ERCN_DEVICE Branches small_tanh_and_gate(float v, float u) {
  Branches on = tanh_and_gate(v, u);
  if (fabsf(v) < 0.25f) {
    const float square = v * v;
    const float series = -1 / 3.0f + square * (2 / 15.0f + square * (-17 / 315.0f + square * (62 / 2835.0f)));
    on.kept = v + v * square * series;
  }
  return on;
}

ERCN_DEVICE float sigmoid(float u) {
  const float b = arch::exp2_fast(-kLog2E * fabsf(u));
  return (u < 0 ? b : 1) * arch::reciprocal_fast(1 + b);
}

ERCN_DEVICE float relu(float v) { return v < 0 ? 0 : v; }  // NaN stays NaN

// Φ(v); GELU is v Φ(v).
ERCN_DEVICE float normal(float v) { return 0.5f + 0.5f * erff(v * 0.70710678118654752f); }

// SMALL: tanh to a few ulp of itself.
template <Activation A, bool SMALL>
ERCN_DEVICE Branches branches(float v, float u) {
  if constexpr (A == Activation::kTanh) {
    return SMALL ? small_tanh_and_gate(v, u) : tanh_and_gate(v, u);
  } else {
    return {A == Activation::kRelu ? relu(v) : v, sigmoid(u)};
  }
}

template <Activation A>
ERCN_DEVICE float value_of(float kept) {
  return A == Activation::kGelu ? kept * normal(kept) : kept;
}

// act'(v); 0 at 0 for ReLU.
template <Activation A>
ERCN_DEVICE float slope_of(float kept) {
  if constexpr (A == Activation::kTanh) {
    return 1 - kept * kept;
  } else if constexpr (A == Activation::kRelu) {
    return kept <= 0 ? 0 : 1;
  } else {
    constexpr float kDensity = 0.39894228040143268f;  // 1 / √(2π)
    return normal(kept) + kept * (kDensity * arch::exp2_fast(-0.5f * kLog2E * (kept * kept)));
  }
}

// act(v) · σ(u)
template <Activation A>
ERCN_DEVICE float gated(float v, float u) {
  if constexpr (A == Activation::kTanh) {
    const float a = arch::exp2_fast(-2 * kLog2E * fabsf(v)), b = arch::exp2_fast(-kLog2E * fabsf(u));
    return copysignf((1 - a) * (u < 0 ? b : 1) * arch::reciprocal_fast((1 + a) * (1 + b)), v);
  } else {
    const Branches on = branches<A, false>(v, u);
    return value_of<A>(on.kept) * on.gate;
  }
}

// function(the activation as a type), the same for all threads
template <typename Function>
ERCN_DEVICE void with_activation(Activation activation, const Function& function) {
  if (activation == Activation::kTanh) {
    function(std::integral_constant<Activation, Activation::kTanh>());
  } else if (activation == Activation::kRelu) {
    function(std::integral_constant<Activation, Activation::kRelu>());
  } else {
    function(std::integral_constant<Activation, Activation::kGelu>());
  }
}

}  // namespace ercn::pool
