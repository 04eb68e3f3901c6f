#pragma once
// Registration and allocation for the operators of the CUDA backend. Under ERCN_EMULATED they take CPU tensors and
// register in a namespace of their own.
#include <arch/elements.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "../backend.h"

#ifdef ERCN_EMULATED
#define ERCN_LIBRARY ercn_emulated
#define ERCN_DISPATCH_KEY CPU
#else
#define ERCN_LIBRARY ercn_native
#define ERCN_DISPATCH_KEY CUDA
#endif
// Expands the macros above before torch's paste them.
#define ERCN_REGISTER(MACRO, ...) MACRO(__VA_ARGS__)

namespace ercn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool on_device(const Tensor& tensor) {
#ifdef ERCN_EMULATED
  return tensor.is_cpu();
#else
  return tensor.is_cuda();
#endif
}

inline Float type_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return type == ScalarType::BFloat16 ? Float::bf16 : type == ScalarType::Half ? Float::fp16 : Float::fp32;
}

// Uninitialised memory on `like`'s device. The emulator fills it with NaN, so that a test sees what no kernel wrote.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  Tensor made = torch::stable::new_empty(like, std::vector<int64_t>(sizes), type);
#ifdef ERCN_EMULATED
  const bool floating = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
  if (floating && made.numel() > 0) torch::stable::fill_(made, std::numeric_limits<double>::quiet_NaN());
#endif
  return made;
}

// Options that Python passes, in a process without it: float32 products have float32's accuracy, as torch's own have by
// default, and ERCN_CUDA_KERNELS names the kernels.
inline bool exact_by_default(const Tensor& x) { return x.scalar_type() == ScalarType::Float; }

inline std::string kernels_from_environment(const std::string& backend) {
  check_backend(backend, "cuda");
  const char* name = std::getenv("ERCN_CUDA_KERNELS");
  return name ? name : "";
}

}  // namespace ercn
