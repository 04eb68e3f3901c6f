#pragma once
// ReLU affinity on Hopper: bf16 and fp16 features of 64, 128, 192 or 256 channels.
#include <string>
#include <tuple>

#include "library.h"

namespace ercn::sm90 {

// Why these tensors cannot be taken, forward or backward, in a sentence; empty where they can.
std::string cannot_relu_affinity(const Tensor& value, const Tensor& feat);

// value [B, C, N] in fp32, bf16 or fp16, feat [B, D, N], any strides -> [B, C, N] in fp32. Of A = relu(FᵀF) all tiles
// are formed, or in a triangle those on one side of the diagonal alone, and what they add to the rows of the other side
// then takes at most mirrored_bytes at a time.
Tensor relu_affinity(
    const Tensor& value, const Tensor& feat, bool triangle, int64_t mirrored_bytes = int64_t{96} << 20);

// -> grad_value in value's type, empty if it is not needed, and grad_feat in feat's.
std::tuple<Tensor, Tensor> relu_affinity_backward(
    const Tensor& grad_out, const Tensor& value, const Tensor& feat, bool need_value);

}  // namespace ercn::sm90
