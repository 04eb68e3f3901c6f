#pragma once
// The pool on any GPU from compute capability 8.0 on, for any sizes and strides.
#include <tuple>

#include "pool/inputs.h"

namespace ercn::pool {

// pooled [B, K, D] in h's type and scores [B, K, N] or [K, T] in fp32; or the scores alone.
std::tuple<Tensor, Tensor> forward(const Inputs& in);
Tensor scores(const Inputs& in);

// h pooled by given scores, fp32 in that layout, and the gradients of (scores, h). The weights have L = 0.
Tensor pool_by_scores(const Tensor& given, const Inputs& in);
std::tuple<Tensor, Tensor> pool_by_scores_backward(
    const Tensor& grad_pooled, const Tensor& given, const Inputs& in, bool need_scores, bool need_h);

// Gradients in h's type of what `needs` asks for, a bit each; the others are empty. pooled is not needed: scores are.
Gradients backward(
    const Optional& grad_pooled, const Optional& grad_scores, const Inputs& in, const Tensor& scores, int64_t needs);

}  // namespace ercn::pool
