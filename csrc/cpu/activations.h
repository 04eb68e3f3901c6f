#pragma once
// tanh and sigmoid of a vector. float: at most 2.6 ulp from the exact value wherever that is a normal number (below it,
// absolute error < 2^-126); exact at 0 and ±Inf, NaN stays NaN. double: the C library's, lane by lane.
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

}  // namespace ercn::ERCN_ISA
