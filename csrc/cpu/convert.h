#pragma once
// Inputs of any floating type, as the kernels take them.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace ercn {

inline torch::stable::Tensor converted(const torch::stable::Tensor& x, torch::headeronly::ScalarType type) {
  return x.scalar_type() == type ? x : torch::stable::to(x, type);
}

// fp64 where one of the two is, else fp32.
inline torch::headeronly::ScalarType type_of_sums(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  using torch::headeronly::ScalarType;
  const bool wide = a.scalar_type() == ScalarType::Double || b.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

// x as the kernels read it beside these sums: in their type, or in bf16 beside fp32.
inline torch::stable::Tensor accepted(const torch::stable::Tensor& x, torch::headeronly::ScalarType sums) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::BFloat16 && sums == ScalarType::Float ? x : converted(x, sums);
}

}  // namespace ercn
