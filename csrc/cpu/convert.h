#pragma once
// Elements and tensors of any floating type, as the kernels take them: float, double, and bfloat16 as uint16_t.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ercn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

inline Tensor converted(const Tensor& x, ScalarType type) {
  return x.scalar_type() == type ? x : torch::stable::to(x, type);
}

// fp64 where one of the two is, else fp32.
inline ScalarType type_of_sums(const Tensor& a, const Tensor& b) {
  const bool wide = a.scalar_type() == ScalarType::Double || b.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

// x as the kernels read it beside these sums: in their type, or in bf16 beside fp32.
inline Tensor accepted(const Tensor& x, ScalarType sums) {
  return x.scalar_type() == ScalarType::BFloat16 && sums == ScalarType::Float ? x : converted(x, sums);
}

}  // namespace ercn
