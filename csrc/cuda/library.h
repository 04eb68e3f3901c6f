#pragma once
// What the operators of the CUDA backend share: where they register, and how they allocate. Under ERCN_EMULATED the
// same operators take CPU tensors and register under a namespace of their own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <vector>

#include "precision.h"

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

// Uninitialised memory on `like`'s device; the emulator fills it with NaN, so that what is left unwritten shows.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  Tensor made = torch::stable::new_empty(like, std::vector<int64_t>(sizes), type);
#ifdef ERCN_EMULATED
  const bool floating = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
  if (floating && made.numel() > 0) torch::stable::fill_(made, std::numeric_limits<double>::quiet_NaN());
#endif
  return made;
}

}  // namespace ercn
