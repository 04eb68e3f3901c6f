#pragma once
// Element types as the host names them, and how products of them are formed: in fp32 sums of exact 16-bit products, or
// in TF32.
//   kTerms   bf16 terms of an affinity where it meets value, which always has two: 16 bits of it count
//   kExact   fp32 accuracy: every factor is a TF32 term and the rest, and three of their products are added
#include <arch/elements.h>

namespace ercn {

enum class Float { fp32, bf16, fp16 };

struct BFloat16 {
  using Element = arch::bf16;
  using Product = arch::bf16;
  static constexpr int kTerms = 1;
  static constexpr bool kExact = false;
};

struct Float16 {
  using Element = arch::fp16;
  using Product = arch::fp16;
  static constexpr int kTerms = 2;
  static constexpr bool kExact = false;
};

struct TensorFloat32 {
  using Element = float;
  using Product = arch::tf32;
  static constexpr int kTerms = 2;
  static constexpr bool kExact = false;
};

struct Float32 {
  using Element = float;
  using Product = arch::tf32;
  static constexpr int kTerms = 0;
  static constexpr bool kExact = true;
};

// function(an element of this type)
template <typename Function>
auto with_half(Float type, const Function& function) {  // of 16 bits
  return type == Float::bf16 ? function(arch::bf16()) : function(arch::fp16());
}
template <typename Function>
auto with_element(Float type, const Function& function) {
  return type == Float::fp32 ? function(float()) : with_half(type, function);
}

// function(its Precision); exact: products of fp32 to fp32's accuracy
template <typename Function>
auto with_precision(Float type, bool exact, const Function& function) {
  if (type == Float::bf16) return function(BFloat16());
  if (type == Float::fp16) return function(Float16());
  return exact ? function(Float32()) : function(TensorFloat32());
}

}  // namespace ercn
