// csrc/cuda/arch/convert.h for the emulator. The special functions err as much as the device's may.
#pragma once

#include <arch/base.h>

namespace ercn::arch {

ERCN_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
ERCN_DEVICE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

ERCN_DEVICE float to_float(float x) { return x; }
ERCN_DEVICE float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
ERCN_DEVICE float to_float(fp16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float sign = x.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return fraction ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
  }
  return sign * (exponent ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                          : std::ldexp(static_cast<float>(fraction), -24));
}

template <typename Element>
ERCN_DEVICE Element from_float(float x);
template <>
ERCN_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
ERCN_DEVICE bf16 from_float<bf16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = float_bits(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
ERCN_DEVICE fp16 from_float<fp16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude == 0) return {sign};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  std::frexp(magnitude, &exponent);
  const int scale = std::max(exponent - 11, -24);  // of the last bit
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -scale)));  // to even
  // A mantissa that was rounded up to 2048 goes on into the exponent, as it should.
  return {static_cast<uint16_t>(sign | (scale == -24 ? units : units + ((scale + 24) << 10)))};
}

template <typename Element>
ERCN_DEVICE uint32_t pack(float low, float high) {
  return from_float<Element>(low).bits | static_cast<uint32_t>(from_float<Element>(high).bits) << 16;
}
template <typename Element>
ERCN_DEVICE uint32_t pack_relu(float low, float high) {
  return pack<Element>(low < 0 ? 0 : low, high < 0 ? 0 : high);
}
template <typename Element>
ERCN_DEVICE float unpack_low(uint32_t pair) {
  return to_float(Element{static_cast<uint16_t>(pair)});
}
template <typename Element>
ERCN_DEVICE float unpack_high(uint32_t pair) {
  return to_float(Element{static_cast<uint16_t>(pair >> 16)});
}

template <typename Element>
ERCN_DEVICE uint32_t nonzero_mask(uint32_t pair) {
  return (pair & 0x7fff ? 0xffffu : 0u) | (pair & 0x7fff0000 ? 0xffff0000u : 0u);
}

ERCN_DEVICE float round_tf32(float x) {
  if (std::isnan(x) || std::isinf(x)) return x;
  return float_of((float_bits(x) + 0x1000) & 0xffffe000);
}

namespace detail {

// x with a relative error of `error`, up or down by its bits; powers of two stay exact, as on the device.
ERCN_DEVICE float disturbed(float x, float error) {
  if ((float_bits(x) & 0x7fffff) == 0) return x;
  return float_bits(x) >> 3 & 1 ? x * (1 + error) : x * (1 - error);
}
ERCN_DEVICE float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

}  // namespace detail

ERCN_DEVICE float exp2_fast(float x) {
  return detail::flushed(detail::disturbed(std::exp2(detail::flushed(x)), 2 * 0x1p-24f));
}
ERCN_DEVICE float reciprocal_fast(float x) {
  return detail::flushed(detail::disturbed(1 / detail::flushed(x), 0x1p-24f));
}

}  // namespace ercn::arch
