// Conversions between element types and fp32, and the special function unit.
#pragma once

#include <arch/base.h>

namespace ercn::arch {

ERCN_DEVICE float to_float(float x) { return x; }
ERCN_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
ERCN_DEVICE float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Rounds to nearest even; fp16 overflows to infinity.
template <typename Element>
ERCN_DEVICE Element from_float(float x);
template <>
ERCN_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
ERCN_DEVICE bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
ERCN_DEVICE fp16 from_float<fp16>(float x) {
  fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two elements in a register, `low` in its lower half.
template <typename Element>
ERCN_DEVICE uint32_t pack(float low, float high);
template <>
ERCN_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
ERCN_DEVICE uint32_t pack<fp16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// pack of max(x, 0); NaN stays NaN.
template <typename Element>
ERCN_DEVICE uint32_t pack_relu(float low, float high);
template <>
ERCN_DEVICE uint32_t pack_relu<bf16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
ERCN_DEVICE uint32_t pack_relu<fp16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

template <typename Element>
ERCN_DEVICE float unpack_low(uint32_t pair) {
  return to_float(Element{static_cast<uint16_t>(pair)});
}
template <typename Element>
ERCN_DEVICE float unpack_high(uint32_t pair) {
  return to_float(Element{static_cast<uint16_t>(pair >> 16)});
}

// 0xffff for each element that is not 0; NaN is not 0.
template <typename Element>
ERCN_DEVICE uint32_t nonzero_mask(uint32_t pair);
template <>
ERCN_DEVICE uint32_t nonzero_mask<bf16>(uint32_t pair) {
  uint32_t mask;
  asm("set.neu.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(pair), "r"(0));
  return mask;
}
template <>
ERCN_DEVICE uint32_t nonzero_mask<fp16>(uint32_t pair) {
  uint32_t mask;
  asm("set.neu.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(pair), "r"(0));
  return mask;
}

ERCN_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
ERCN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// fp32 rounded to TF32: nearest, ties away from zero.
ERCN_DEVICE float round_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}

// 2^x, at most 2 ulp off; subnormal results are 0.
ERCN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, at most 1 ulp off; 0 for |x| >= 2^126.
ERCN_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace ercn::arch
