#pragma once
// Affinity on any GPU from compute capability 8.0 on: any strides, fp32, bf16 and fp16.
#include <tuple>

#include "library.h"

namespace ercn::affinity {

// out [B, C, N] fp32 = V relu(FᵀF); exact: products of fp32 features in fp32 accuracy, else in TF32.
Tensor forward(const Tensor& value, const Tensor& feat, bool exact);

// -> grad_value = G A in value's dtype, empty unless need_value, and grad_feat in feat's.
std::tuple<Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& value, const Tensor& feat, bool need_value, bool exact);

}  // namespace ercn::affinity
