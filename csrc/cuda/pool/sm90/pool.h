#pragma once
// Gated attention pooling on Hopper: bf16 and fp16, gated, D ≤ 3072 and L multiples of 64, at most 8 heads, h with rows
// of channels or channels of rows that the copy engine can read where they lie.
#include <string>

#include "pool/inputs.h"

namespace ercn::sm90 {

// Why these kernels do not take the tensors, in a sentence, or "".
std::string cannot_pool(const pool::Inputs& in);

// pooled [B, K, D] in h's type and scores [B, K, N] or [K, T] in fp32; or the scores alone.
std::tuple<Tensor, Tensor> pool_forward(const pool::Inputs& in);
Tensor pool_scores(const pool::Inputs& in);

// Gradients in h's type of what `needs` asks for, a bit each; the others are empty. pooled is not needed: scores are.
pool::Gradients pool_backward(
    const pool::Optional& grad_pooled, const pool::Optional& grad_scores, const pool::Inputs& in, const Tensor& scores,
    int64_t needs);

}  // namespace ercn::sm90
