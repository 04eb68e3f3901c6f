#pragma once
// The operator on the kernels of either pool. Kernels are made from h, the problem and the stream, and have
//   forward, products, branch, rows, weights   each of its params in problem.h
//   columns()                                  of dP
//   shares(need_v, need_u, slots)              of dPᵀ h over so many slots
#include <algorithm>
#include <array>

#include "pool/inputs.h"
#include "pool/steps.h"

namespace ercn::pool {

// fp32 scratch that lives as long as the operator's call.
inline float* floats(const Tensor& held) { return static_cast<float*>(held.mutable_data_ptr()); }
inline float* floats(bool wanted, const Tensor& held) { return wanted ? floats(held) : nullptr; }

// A gradient of h's shape and type, contiguous, or an empty one.
inline Tensor empty_gradient(bool wanted, const Tensor& h) {
  if (!wanted) return empty(h, {0}, h.scalar_type());
  if (h.dim() == 2) return empty(h, {h.size(0), h.size(1)}, h.scalar_type());
  return empty(h, {h.size(0), h.size(1), h.size(2)}, h.scalar_type());
}

// pooled [B, K, D] in h's type; the scores go to `scores`, or h is pooled by those `given`.
template <typename Kernels>
Tensor pool_by(
    const Tensor& h, const Problem& p, const arch::Stream& stream, float* scores, const float* given = nullptr) {
  const int64_t slots = slot_count(p.bags);
  const Tensor pooled = empty(h, {p.bags.count, p.K, p.D}, h.scalar_type());
  const Tensor softmax = empty(h, {2, slots, p.K}, ScalarType::Float);
  const Tensor sums = empty(h, {slots, p.K, pooled_width(p.D)}, ScalarType::Float);
  const Parts parts{floats(softmax), floats(softmax) + slots * p.K, floats(sums)};
  if (p.bags.rows > 0) Kernels(h, p, stream).forward({p, parts, scores, given});
  combine({p, parts, pooled.mutable_data_ptr()}, stream);
  return pooled;
}

// pooled, and scores [B, K, N] or [K, T] in fp32.
template <typename Kernels>
std::tuple<Tensor, Tensor> forward(const Inputs& in) {
  const arch::Stream stream(in.h);
  const Operands operands(in);
  const Tensor scores = empty_scores(in.h, operands.problem);
  return {pool_by<Kernels>(in.h, operands.problem, stream, floats(scores)), scores};
}

// The scores alone.
template <typename Kernels>
Tensor scores(const Inputs& in) {
  const arch::Stream stream(in.h);
  const Operands operands(in);
  const Tensor scores = empty_scores(in.h, operands.problem);
  if (operands.problem.bags.rows > 0) {
    Kernels(in.h, operands.problem, stream).forward({operands.problem, {}, floats(scores), nullptr});
  }
  return scores;
}

// The gradient ds of scores, from that of pooled and that of scores.
struct ScoreGradient {
  Optional grad_pooled;         // ĝ, aligned
  Tensor ds, attention;         // in the layout of scores; attention only with grad_pooled
  Tensor parts, largest, real;  // as steps.h has them; largest for fp16 only

  template <typename Kernels>
  ScoreGradient(
      const Kernels& kernels, const Optional& given, const Optional& grad_scores, const Tensor& h, const Problem& p,
      const Tensor& saved_scores, const arch::Stream& stream)
      : grad_pooled(aligned(given)),
        ds(empty_scores(h, p)),
        attention(given ? empty_scores(h, p) : empty(h, {0}, ScalarType::Float)),
        parts(empty(h, {slot_count(p.bags), p.K}, ScalarType::Float)),
        largest(empty(h, {p.type == Float::fp16 ? slot_count(p.bags) : 0}, ScalarType::Float)),
        real(empty(h, {slot_count(p.bags), 2}, ScalarType::Int)) {
    const int64_t cells = slot_count(p.bags) * p.K, heads = p.bags.count * p.K;
    const Tensor scores = torch::stable::contiguous(saved_scores);
    const Tensor segments = empty(h, {3, cells}, ScalarType::Float), bags = empty(h, {3, heads}, ScalarType::Float);
    ScoreGradientParams of{p};
    of.scores = floats(scores), of.grad = floats(ds), of.parts = floats(parts), of.real = bits();
    of.largest = floats(p.type == Float::fp16, largest);
    if (grad_scores) {
      const int64_t dims = grad_scores->dim();
      of.grad_scores = static_cast<const float*>(grad_scores->const_data_ptr());
      of.grad_b = dims == 2 ? 0 : grad_scores->stride(0);
      of.grad_k = grad_scores->stride(dims - 2);
      of.grad_n = grad_scores->stride(dims - 1);
    }
    if (grad_pooled) {
      const Parts softmax{floats(segments), floats(segments) + cells, nullptr};
      float* weighted = floats(segments) + 2 * cells;
      of.bags = {floats(bags), floats(bags) + heads, floats(bags) + 2 * heads};
      of.attention = floats(attention);
      kernels.products({p, grad_pooled->const_data_ptr(), of.scores, of.grad, softmax, weighted});
      combine_statistics({p, softmax, weighted, of.bags}, stream);
    }
    score_gradient(of, stream);
  }

  uint32_t* bits() const { return static_cast<uint32_t*>(real.mutable_data_ptr()); }
};

// Gradients of (scores, h) of pool_by(given), those that are needed.
template <typename Kernels>
std::tuple<Tensor, Tensor> backward_by(
    const Tensor& grad_pooled, const Tensor& given, const Inputs& in, bool need_scores, bool need_h) {
  const arch::Stream stream(in.h);
  const Operands operands(in);
  const Problem& p = operands.problem;
  const Tensor grad_h = empty_gradient(need_h, in.h), nothing = empty(in.h, {0}, ScalarType::Float);
  if (p.bags.rows == 0) return {need_scores ? empty_scores(in.h, p) : nothing, grad_h};
  const Kernels kernels(in.h, p, stream);
  const ScoreGradient of(kernels, grad_pooled, std::nullopt, in.h, p, given, stream);
  if (need_h) {
    kernels.rows(
        {p, nullptr, nullptr, of.bits(), floats(of.attention), of.grad_pooled->const_data_ptr(),
         grad_h.mutable_data_ptr(), 0, slot_count(p.bags)});
  }
  return {need_scores ? of.ds : nothing, grad_h};
}

// Gradients in h's type of what `needs` asks for, a bit each; the others are empty.
template <typename Kernels>
Gradients backward(
    const Optional& grad_pooled, const Optional& grad_scores, const Inputs& in, const Tensor& scores, int64_t needs) {
  const arch::Stream stream(in.h);
  const Operands operands(in);
  const Problem& p = operands.problem;
  const int64_t slots = slot_count(p.bags), branches = p.gated ? 2 : 1, L = p.L, D = p.D, K = p.K;
  const bool given[] = {true, true, in.v_bias.has_value(), p.gated, in.u_bias.has_value(), true, in.w_bias.has_value()};
  const auto wanted = [&](Gradient which) { return given[which] && (needs >> which & 1) != 0; };
  const auto grad = [&](Gradient which, std::initializer_list<int64_t> sizes) {
    return wanted(which) ? empty(in.h, sizes, in.h.scalar_type()) : empty(in.h, {0}, in.h.scalar_type());
  };
  const std::array<Tensor, 7> grads{
      empty_gradient(wanted(kH), in.h), grad(kVWeight, {L, D}), grad(kVBias, {L}), grad(kUWeight, {L, D}),
      grad(kUBias, {L}), grad(kWWeight, {K, L}), grad(kWBias, {K})};
  if (p.bags.rows == 0) {
    for (Tensor none : grads) torch::stable::zero_(none);
    return std::tuple_cat(grads);
  }
  const auto add_parts = [&](Gradient which, const float* parts, int64_t rows, int64_t stride) {
    if (!wanted(which)) return;
    column_sums({parts, rows, stride, grads[which].numel(), grads[which].mutable_data_ptr(), p.type}, stream);
  };

  const Kernels kernels(in.h, p, stream);
  const ScoreGradient of(kernels, grad_pooled, grad_scores, in.h, p, scores, stream);
  add_parts(kWBias, floats(of.parts), slots, K);

  const bool biases = wanted(kVBias) || wanted(kUBias), weights = wanted(kVWeight) || wanted(kUWeight);
  const bool products = wanted(kH) || weights;
  if (!products && !biases && !wanted(kWWeight)) return std::tuple_cat(grads);
  const auto make = [&](std::initializer_list<int64_t> sizes) { return empty(in.h, sizes, ScalarType::Float); };
  const auto parts_of_slots = [&](bool made, int64_t columns) {
    Tensor parts = make({made ? slots : 0, columns});
    return in.cu_seqlens ? torch::stable::zero_(parts) : parts;  // ragged bags leave slots without a segment
  };
  const Tensor part_heads = parts_of_slots(wanted(kWWeight), K * L), part_biases = parts_of_slots(biases, branches * L);
  const int64_t slot_bytes = kSegmentRows * kernels.columns() * in.h.element_size();
  const int64_t held = std::min(slots, chunk_slots(slot_bytes, stream.l2_bytes()));
  const Tensor branch_grads =
      empty(in.h, {products ? held * kSegmentRows : 0, kernels.columns()}, in.h.scalar_type());
  const WeightShares shares = kernels.shares(wanted(kVWeight), wanted(kUWeight), held);
  const Tensor part_weights = make({weights ? shares.splits : 0, shares.units, D}), scale = make({2});
  if (p.type == Float::fp16) branch_scale({p, floats(of.largest), floats(scale)}, stream);
  const float* scale_of = floats(p.type == Float::fp16, scale);
  void* const dp = products ? branch_grads.mutable_data_ptr() : nullptr;
  for (int64_t first = 0; first < slots; first += held) {
    const int64_t last = std::min(slots, first + held);
    kernels.branch(
        {p, floats(of.ds), scale_of, dp, floats(wanted(kWWeight), part_heads), floats(biases, part_biases), first,
         last});
    if (wanted(kH)) {
      kernels.rows(
          {p, dp, scale_of, of.bits(), floats(grad_pooled.has_value(), of.attention),
           grad_pooled ? of.grad_pooled->const_data_ptr() : nullptr, grads[kH].mutable_data_ptr(), first, last});
    }
    if (weights) {
      kernels.weights({p, dp, scale_of, of.bits(), floats(part_weights), shares, first > 0, first, last});
    }
  }
  const int64_t outputs = shares.units * D;
  add_parts(kVWeight, floats(part_weights), shares.splits, outputs);
  add_parts(kUWeight, floats(part_weights) + (L - shares.first_unit) * D, shares.splits, outputs);
  add_parts(kVBias, floats(part_biases), slots, branches * L);
  add_parts(kUBias, floats(part_biases) + L, slots, branches * L);
  add_parts(kWWeight, floats(part_heads), slots, K * L);
  return std::tuple_cat(grads);
}

}  // namespace ercn::pool
