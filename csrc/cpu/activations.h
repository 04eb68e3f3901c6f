#pragma once
// tanh, sigmoid and gelu of a vector. float: tanh and sigmoid are within 2.6 ulp of the exact value where that is a
// normal number (absolute error < 2^-126 elsewhere), and exact at 0 and ±Inf; gelu(x) is within 2.2e-7 |x| and its
// slope within 2.2e-7; NaN stays NaN. double: the C library's functions, lane by lane.
#include "simd.h"

namespace ercn::ERCN_ISA {

// 2^n (1 + q) = exp(y) for |y| <= 88, q = expm1 of the rest |r| <= ln(2) / 2. From y = -87.7 on, 2^n is 0.
ERCN_INLINE void exp_parts(Vec<float> y, Vec<float>& power, Vec<float>& q) {
  const float to_integer = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Vec<float> shifted = y * 0x1.715476p+0f + to_integer;
  const Vec<float> n = shifted - to_integer;
  const Vec<float> r = y - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts; n times the first is exact
  power = (Vec<float>)(((Vec<int32_t>)shifted + 127) << 23);
  // (expm1(r) - r) / r², minimax on |r| <= ln(2) / 2: relative error of expm1 1.4e-8
  Vec<float> p = 0x1.6bebf6p-10f * r + 0x1.1227f6p-7f;
  p = p * r + 0x1.555674p-5f;
  p = p * r + 0x1.5554bp-3f;
  p = p * r + 0x1.fffffep-2f;
  q = p * (r * r) + r;
}

ERCN_INLINE Vec<float> magnitude(Vec<float> x, float limit) {  // min(|x|, limit); NaN stays
  const Vec<float> a = (Vec<float>)((Vec<int32_t>)x & 0x7fffffff), most = Vec<float>{} + limit;
  return a > most ? most : a;
}

ERCN_INLINE Vec<float> tanh(Vec<float> x) {
  Vec<float> power, q;
  exp_parts(2.f * magnitude(x, 10.f), power, q);  // from 9.02 on tanh rounds to 1
  const Vec<float> m = power * q + (power - 1.f);  // expm1(2|x|)
  const Vec<float> positive = m / (m + 2.f);
  const Vec<int32_t> sign = (Vec<int32_t>)x & INT32_MIN;
  return (Vec<float>)((Vec<int32_t>)positive | sign);
}

ERCN_INLINE Vec<float> sigmoid(Vec<float> x) {
  Vec<float> power, q;
  exp_parts(-magnitude(x, 88.f), power, q);
  const Vec<float> z = power * q + power;  // exp(-|x|), in [0, 1]: nothing overflows
  return (x < 0.f ? z : Vec<float>{} + 1.f) / (z + 1.f);
}

ERCN_INLINE Vec<double> tanh(Vec<double> x) {
  for (unsigned i = 0; i < sizeof(x) / sizeof(double); ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

ERCN_INLINE Vec<double> sigmoid(Vec<double> x) {
  for (unsigned i = 0; i < sizeof(x) / sizeof(double); ++i) x[i] = 1 / (1 + __builtin_exp(-x[i]));
  return x;
}

// Φ(x) and x φ(x) of the normal distribution: gelu(x) = x Φ(x), gelu'(x) = Φ(x) + x φ(x).
ERCN_INLINE void normal(Vec<float> x, Vec<float>& cumulative, Vec<float>& weighted_density) {
  const Vec<float> z = magnitude(x, 13.2f);  // from there on Φ rounds to 1, and is less than 2^-126 on the other side
  Vec<float> power, q;
  exp_parts(-0.5f * z * z, power, q);
  const Vec<float> decay = z < 13.2f ? power * q + power : Vec<float>{};  // exp(-z² / 2)
  // Φ(-z) exp(z² / 2) as a polynomial of 1 / (1 + z / 4), minimax on 0 <= z <= 13.2: relative error 1.2e-8
  const Vec<float> t = 1.f / (0.25f * z + 1.f);
  Vec<float> p = 0x1.1d1424p-5f * t - 0x1.9b38cep-3f;
  p = p * t + 0x1.9f9102p-2f;
  p = p * t - 0x1.643f4ep-2f;
  p = p * t + 0x1.441b4ap-2f;
  p = p * t - 0x1.b84108p-6f;
  p = p * t + 0x1.fb3646p-4f;
  p = p * t + 0x1.825e84p-4f;
  p = p * t + 0x1.9ac908p-4f;
  p = p * t - 0x1.9fe666p-16f;
  const Vec<float> tail = p * decay;
  cumulative = x < 0.f ? tail : 1.f - tail;
  weighted_density = 0x1.988454p-2f * x * decay;  // 1 / sqrt(2 π)
}

ERCN_INLINE void normal(Vec<double> x, Vec<double>& cumulative, Vec<double>& weighted_density) {
  for (unsigned i = 0; i < sizeof(x) / sizeof(double); ++i) {
    cumulative[i] = 0.5 * __builtin_erfc(-0x1.6a09e667f3bcdp-1 * x[i]);  // sqrt(1 / 2)
    weighted_density[i] = 0x1.9884533d43651p-2 * x[i] * __builtin_exp(-0.5 * x[i] * x[i]);
  }
}

}  // namespace ercn::ERCN_ISA
