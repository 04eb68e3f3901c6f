#pragma once
// Element types in memory: float, double, and bfloat16 as uint16_t.
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ercn {

template <typename To, typename From>
inline To convert(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<To, uint16_t>) {  // to nearest even; NaN stays one
    const float narrow = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    if (narrow != narrow) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else if constexpr (std::is_same_v<From, uint16_t>) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  } else {
    return static_cast<To>(x);
  }
}

}  // namespace ercn
