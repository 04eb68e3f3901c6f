#pragma once
// The pool on any GPU from compute capability 8.0 on, for any sizes and strides.
#include <tuple>

#include "pool/inputs.h"

namespace ercn::pool {

// pooled [B, K, D] in h's type and scores [B, K, N] or [K, T] in fp32; exact: fp32 products to fp32's accuracy, not
// TF32's.
std::tuple<Tensor, Tensor> forward(const Inputs& in, bool exact);

// Gradients in h's type of what `needs` asks for, a bit each; the others are empty.
Gradients backward(
    const Optional& grad_pooled, const Optional& grad_scores, const Inputs& in, const Tensor& scores, int64_t needs,
    bool exact);

}  // namespace ercn::pool
