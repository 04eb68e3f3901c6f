// Launches the generic kernels of the pool.
#include "pool/pool.h"

#include <algorithm>

#include "affinity/precision.h"
#include "pool/backward.h"
#include "pool/branch.h"
#include "pool/dots.h"
#include "pool/forward.h"
#include "pool/gradients.h"
#include "pool/scale.h"

namespace ercn::pool {
namespace {

// Packed weights and what holds them.
template <typename Element>
struct PackedWeights {
  Tensor projections, others;
  Packed<Element> packed;

  PackedWeights(const Inputs& in, const Operands& operands, const arch::Stream& stream) {
    const Problem& p = operands.problem;
    const Columns columns{p.L, in.u_weight.has_value()};
    const int64_t count = column_count(columns);
    packed.depth = packed_depth(p.D);
    projections = empty(in.h, {count, packed.depth}, in.h.scalar_type());
    others = empty(in.h, {count + int64_t{p.K} * padded_units(columns)}, ScalarType::Float);
    packed.projections = static_cast<Element*>(projections.mutable_data_ptr());
    packed.biases = floats(others);
    packed.heads = packed.biases + count;
    pack(p, operands.weights, packed, stream);
  }
};

template <typename Precision>
std::tuple<Tensor, Tensor> forward_as(const Inputs& in) {
  const arch::Stream stream(in.h);
  const Operands operands(in);
  const Problem& p = operands.problem;
  const int64_t slots = slot_count(p.bags);
  const Tensor pooled = empty(in.h, {p.bags.count, p.K, p.D}, in.h.scalar_type()), scores = empty_scores(in.h, p);
  const Tensor softmax = empty(in.h, {2, slots, p.K}, ScalarType::Float);
  const Tensor sums = empty(in.h, {slots, p.K, pooled_width(p.D)}, ScalarType::Float);
  const Parts parts{floats(softmax), floats(softmax) + slots * p.K, floats(sums)};
  const PackedWeights<typename Precision::Element> weights(in, operands, stream);
  forward<Precision>(
      p, weights.packed, {parts, floats(scores), operands.weights.w_bias}, in.u_weight.has_value(), stream);
  combine(p, parts, pooled.mutable_data_ptr(), type_of(in.h), stream);
  return {pooled, scores};
}

template <typename Precision>
Gradients backward_as(
    const Optional& grad_pooled, const Optional& grad_scores, const Inputs& in, const Tensor& scores, int64_t needs) {
  using Element = typename Precision::Element;
  const arch::Stream stream(in.h);
  const Operands operands(in);
  const Problem& p = operands.problem;
  const Type type = type_of(in.h);
  const bool gated = in.u_weight.has_value();
  const int64_t slots = slot_count(p.bags), branches = gated ? 2 : 1, L = p.L, D = p.D, K = p.K;
  const Columns columns{p.L, gated};
  const Wanted wanted(in, p, needs);
  const auto add_parts = [&](Gradient which, const Tensor& to, const Tensor& parts, int64_t offset, int64_t stride) {
    if (!wanted(which)) return;
    column_sums(floats(parts) + offset, parts.size(0), stride, to.numel(), to.mutable_data_ptr(), type, stream);
  };

  const ScoreGradients of(
      grad_pooled, grad_scores, in, p, scores, stream,
      [&](const void* grad, const float* scores, float* q, const Parts& parts, float* weighted) {
        dots<Element>(p, {grad, scores, q, parts, weighted}, stream);
      });
  add_parts(kWBias, std::get<kWBias>(wanted.grads), of.parts, 0, K);

  const bool biases = wanted(kVBias) || wanted(kUBias), weights = wanted(kVWeight) || wanted(kUWeight);
  const bool products = wanted(kH) || weights;
  if (!products && !biases && !wanted(kWWeight)) return wanted.grads;
  // dP is held for as many slots as leave half of the L2 cache to what is read with it.
  const int64_t slot_bytes = kSegmentRows * column_count(columns) * static_cast<int64_t>(sizeof(Element));
  const int64_t held = std::clamp<int64_t>(
      stream.l2_bytes() / 2 / std::max<int64_t>(slot_bytes, 1), 1, std::max<int64_t>(slots, 1));
  const int blocks = std::max(weight_gradient_blocks(p.D, columns), 1);
  const int splits = std::clamp<int>(arch::divide_up(2 * stream.multiprocessors(), blocks), 1, static_cast<int>(held));
  const auto make = [&](bool made, std::initializer_list<int64_t> sizes) {
    return made ? empty(in.h, sizes, ScalarType::Float) : empty(in.h, {0}, ScalarType::Float);
  };
  const Tensor part_heads = make(wanted(kWWeight), {slots, K, L}), part_biases = make(biases, {slots, branches, L});
  const Tensor part_weights = make(weights, {splits, branches, L, D}), scale = make(true, {2});
  const Tensor branch_grads =
      empty(in.h, {products ? held * kSegmentRows : 0, column_count(columns)}, in.h.scalar_type());
  Element* held_grads = products ? static_cast<Element*>(branch_grads.mutable_data_ptr()) : nullptr;
  if (type == Type::kFp16) {
    branch_scale(floats(of.largest), slots, operands.weights.w, K * L, p.K, floats(scale), stream);
  }
  const float* scale_of = floats(type == Type::kFp16, scale);
  const Element* grad = grad_pooled ? static_cast<const Element*>(of.grad_pooled->const_data_ptr()) : nullptr;
  Element* grad_h = static_cast<Element*>(std::get<kH>(wanted.grads).mutable_data_ptr());
  const PackedWeights<Element> packed(in, operands, stream);
  int64_t first = 0;
  do {  // once at least: without instances the sums are 0
    const int64_t last = std::min(slots, first + held);
    branch<Precision>(
        p, packed.packed,
        {floats(of.ds), scale_of, held_grads, floats(wanted(kWWeight), part_heads), floats(biases, part_biases), first,
         last},
        gated, stream);
    if (wanted(kH)) {
      row_gradient<Precision>(
          p, packed.packed,
          {held_grads, scale_of, of.bits(), floats(grad_pooled.has_value(), of.attention), grad, grad_h, first, last},
          gated, stream);
    }
    if (weights) {
      weight_gradient<Precision>(
          p, {held_grads, scale_of, of.bits(), floats(part_weights), splits, first > 0, first, last}, gated, stream);
    }
    first = last;
  } while (first < slots);
  add_parts(kVWeight, std::get<kVWeight>(wanted.grads), part_weights, 0, branches * L * D);
  add_parts(kUWeight, std::get<kUWeight>(wanted.grads), part_weights, L * D, branches * L * D);
  add_parts(kVBias, std::get<kVBias>(wanted.grads), part_biases, 0, branches * L);
  add_parts(kUBias, std::get<kUBias>(wanted.grads), part_biases, L, branches * L);
  add_parts(kWWeight, std::get<kWWeight>(wanted.grads), part_heads, 0, K * L);
  return wanted.grads;
}

}  // namespace

std::tuple<Tensor, Tensor> forward(const Inputs& in, bool exact) {
  switch (type_of(in.h)) {
    case Type::kBf16: return forward_as<affinity::BFloat16>(in);
    case Type::kFp16: return forward_as<affinity::Float16>(in);
    default: return exact ? forward_as<affinity::Float32>(in) : forward_as<affinity::TensorFloat32>(in);
  }
}

Gradients backward(
    const Optional& grad_pooled, const Optional& grad_scores, const Inputs& in, const Tensor& scores, int64_t needs,
    bool exact) {
  switch (type_of(in.h)) {
    case Type::kBf16: return backward_as<affinity::BFloat16>(grad_pooled, grad_scores, in, scores, needs);
    case Type::kFp16: return backward_as<affinity::Float16>(grad_pooled, grad_scores, in, scores, needs);
    default:
      return exact ? backward_as<affinity::Float32>(grad_pooled, grad_scores, in, scores, needs)
                   : backward_as<affinity::TensorFloat32>(grad_pooled, grad_scores, in, scores, needs);
  }
}

}  // namespace ercn::pool
