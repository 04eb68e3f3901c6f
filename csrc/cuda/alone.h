#pragma once
// A call of ercn::* in a process without Python, whose launcher gives else what is given here: float32 products keep
// its accuracy, as torch's own do by default, and ERCN_CUDA_KERNELS rules.
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <string>

#include "../backend.h"

namespace ercn {

inline bool exact_alone(const torch::stable::Tensor& x) {
  return x.scalar_type() == torch::headeronly::ScalarType::Float;
}

inline std::string kernels_alone(const std::string& backend) {
  check_backend(backend, "cuda");
  const char* name = std::getenv("ERCN_CUDA_KERNELS");
  return name ? name : "";
}

}  // namespace ercn
