#pragma once
// ReLU affinity on Hopper: bf16 and fp16 features of 64, 128, 192 or 256 channels.
#include <string>
#include <tuple>

#include "library.h"

namespace ercn::sm90 {

// Why the kernels cannot run on these tensors, forward or backward, in a sentence; empty where they can.
std::string cannot_relu_affinity(const Tensor& value, const Tensor& feat);

// value [B, C, N] in fp32, bf16 or fp16, feat [B, D, N], any strides -> [B, C, N] in fp32. triangle: tiles of
// A = relu(FᵀF) on one side of the diagonal only, whose mirrored sums take at most mirrored_bytes at a time; else all.
Tensor relu_affinity(
    const Tensor& value, const Tensor& feat, bool triangle, int64_t mirrored_bytes = int64_t{96} << 20);

// -> grad_value in value's type, empty unless need_value, and grad_feat in feat's.
std::tuple<Tensor, Tensor> relu_affinity_backward(
    const Tensor& grad_out, const Tensor& value, const Tensor& feat, bool need_value);

}  // namespace ercn::sm90
