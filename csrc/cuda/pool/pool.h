#pragma once
// The pool on any GPU from compute capability 8.0 on, for any sizes and strides.
#include <tuple>

#include "pool/inputs.h"

namespace ercn::pool {

// pooled [B, K, D] in h's type and scores [B, K, N] or [K, T] in fp32.
std::tuple<Tensor, Tensor> forward(const Inputs& in);

// Gradients in h's type of what `needs` asks for, a bit each; the others are empty. pooled is not needed: scores are.
Gradients backward(
    const Optional& grad_pooled, const Optional& grad_scores, const Inputs& in, const Tensor& scores, int64_t needs);

}  // namespace ercn::pool
