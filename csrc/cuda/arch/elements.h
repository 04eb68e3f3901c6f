// Element types in memory, their names on the host, and the precision in which they are multiplied.
#pragma once

#include <cstdint>

namespace ercn::arch {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// fp32 of which the tensor cores read the upper 19 bits.
struct tf32 {
  float value;
};

}  // namespace ercn::arch

namespace ercn {

enum class Float { fp32, bf16, fp16 };

// Products are fp32 sums of exact 16-bit products, or TF32.
//   kTerms   bf16 terms of an affinity in its product with value, which always has two: 16 bits of it count
//   kExact   fp32 accuracy: every factor is the sum of two TF32 terms, and three of their products are added
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

// function(an element of this type), of 16-bit types and of all.
template <typename Function>
auto with_half(Float type, const Function& function) {
  return type == Float::bf16 ? function(arch::bf16()) : function(arch::fp16());
}
template <typename Function>
auto with_element(Float type, const Function& function) {
  return type == Float::fp32 ? function(float()) : with_half(type, function);
}

// function(its precision). exact: fp32 is multiplied to fp32's accuracy, not in TF32.
template <typename Function>
auto with_precision(Float type, bool exact, const Function& function) {
  if (type == Float::bf16) return function(BFloat16());
  if (type == Float::fp16) return function(Float16());
  return exact ? function(Float32()) : function(TensorFloat32());
}

}  // namespace ercn
