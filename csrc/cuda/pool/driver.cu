#include "pool/driver.h"

#include <algorithm>
#include <array>

#include "pool/steps.h"

namespace ercn::pool {
namespace {

// One call of the operator: the stream, the problem, and the tensors behind it.
struct Call {
  const Tensor& h;
  const arch::Stream stream;
  const Operands operands;
  const Problem& p;
  const int64_t slots;
  MakeKernels* const make;

  Call(const Inputs& in, MakeKernels* make)
      : h(in.h), stream(h), operands(in), p(operands.problem), slots(slot_count(p.bags)), make(make) {}

  std::unique_ptr<Kernels> kernels() const { return make(h, p, stream); }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type = ScalarType::Float) const {
    return ercn::empty(h, sizes, type);
  }
  Tensor empty_scores() const {
    return p.bags.cu_seqlens != nullptr ? empty({p.K, p.bags.rows}) : empty({p.bags.count, p.K, p.bags.n});
  }
  Tensor empty_grad_h(bool wanted) const {
    if (!wanted) return empty({0}, h.scalar_type());
    if (h.dim() == 2) return empty({h.size(0), h.size(1)}, h.scalar_type());
    return empty({h.size(0), h.size(1), h.size(2)}, h.scalar_type());
  }
};

// pooled; the scores go to `scores`, or h is pooled by those `given`.
Tensor pool(const Call& call, float* scores, const float* given = nullptr) {
  const Problem& p = call.p;
  const Tensor pooled = call.empty({p.bags.count, p.K, p.D}, call.h.scalar_type());
  const Tensor statistics = call.empty({2, call.slots, p.K});
  const Tensor sums = call.empty({call.slots, p.K, pooled_width(p.D)});
  const SegmentSoftmax softmax{floats(statistics), floats(statistics) + call.slots * p.K};
  if (p.bags.rows > 0) call.kernels()->forward({p, softmax, floats(sums), scores, given});
  combine({p.bags, p.D, p.K, p.type, softmax, floats(sums), pooled.mutable_data_ptr()}, call.stream);
  return pooled;
}

// The gradient ds of scores, and what its kernel finds beside it.
class ScoreGradient {
 public:
  const Optional grad_pooled;         // ĝ, aligned
  const Tensor ds, attention;         // in the layout of scores; attention only with grad_pooled
  const Tensor parts, largest, real;  // as in ScoreGradientParams; largest for fp16 only

  ScoreGradient(
      const Call& call, const Kernels& kernels, const Optional& grad, const Optional& grad_scores,
      const Tensor& saved_scores)
      : grad_pooled(aligned(grad)),
        ds(call.empty_scores()),
        attention(grad ? call.empty_scores() : call.empty({0})),
        parts(call.empty({call.slots, call.p.K})),
        largest(call.empty({call.p.type == Float::fp16 ? call.slots : 0})),
        real(call.empty({call.slots, 2}, ScalarType::Int)) {
    const Problem& p = call.p;
    const Tensor scores = torch::stable::contiguous(saved_scores), statistics = call.empty({3, p.bags.count, p.K});
    ScoreGradientParams params{p.bags, p.K, p.mask};
    params.scores = floats(scores), params.grad = floats(ds), params.parts = floats(parts), params.real = bits();
    if (p.type == Float::fp16) params.largest = floats(largest);
    if (grad_scores) {
      const int64_t dims = grad_scores->dim(), stride_b = dims == 2 ? 0 : grad_scores->stride(0);
      params.grad_scores = {
          static_cast<const float*>(grad_scores->const_data_ptr()), stride_b, grad_scores->stride(dims - 2),
          grad_scores->stride(dims - 1)};
    }
    if (grad_pooled) {
      params.statistics = bag_statistics(call, kernels, params.scores, statistics);
      params.attention = floats(attention);
    }
    score_gradient(params, call.stream);
  }

  uint32_t* bits() const { return static_cast<uint32_t*>(real.mutable_data_ptr()); }
  const void* grad_data() const { return grad_pooled ? grad_pooled->const_data_ptr() : nullptr; }
  const float* attention_data() const { return grad_pooled ? floats(attention) : nullptr; }

 private:
  // Leaves q = ĝ·h in ds.
  Statistics bag_statistics(const Call& call, const Kernels& kernels, const float* scores, const Tensor& to) const {
    const Problem& p = call.p;
    const int64_t segments = call.slots * p.K, bags = p.bags.count * p.K;
    const Tensor of_segments = call.empty({3, segments});
    const SegmentSoftmax softmax{floats(of_segments), floats(of_segments) + segments};
    float* weighted = floats(of_segments) + 2 * segments;
    const Statistics statistics{floats(to), floats(to) + bags, floats(to) + 2 * bags};
    kernels.dots({p, grad_data(), scores, floats(ds), softmax, weighted});
    combine_statistics({p.bags, p.K, softmax, weighted, statistics}, call.stream);
    return statistics;
  }
};

// Bits of `needs`, in the order of the operator's outputs.
enum Gradient { kH, kVWeight, kVBias, kUWeight, kUBias, kWWeight, kWBias };

// The gradients in h's type, those that exist and are needed; the others are empty.
struct Outputs {
  const Call& call;
  const bool exists[7];
  const int64_t needs, L = call.p.L, D = call.p.D, K = call.p.K;
  const std::array<Tensor, 7> tensors{call.empty_grad_h(wanted(kH)),
                                      make(kVWeight, {L, D}),
                                      make(kVBias, {L}),
                                      make(kUWeight, {L, D}),
                                      make(kUBias, {L}),
                                      make(kWWeight, {K, L}),
                                      make(kWBias, {K})};

  Outputs(const Call& call, const Inputs& in, int64_t needs)
      : call(call),
        exists{true, true, in.v_bias.has_value(), call.p.gated, in.u_bias.has_value(), true, in.w_bias.has_value()},
        needs(needs) {}

  Tensor make(Gradient which, std::initializer_list<int64_t> sizes) const {
    return wanted(which) ? call.empty(sizes, call.h.scalar_type()) : call.empty({0}, call.h.scalar_type());
  }
  bool wanted(Gradient which) const { return exists[which] && (needs >> which & 1) != 0; }
  bool biases() const { return wanted(kVBias) || wanted(kUBias); }
  bool weights() const { return wanted(kVWeight) || wanted(kUWeight); }
  // A gradient that is a product with dP.
  bool products() const { return wanted(kH) || weights(); }

  // The sum of `rows` partial results `stride` floats apart.
  void add(Gradient which, const float* parts, int64_t rows, int64_t stride) const {
    if (!wanted(which)) return;
    const Tensor& to = tensors[which];
    column_sums({parts, rows, stride, to.numel(), to.mutable_data_ptr(), call.p.type}, call.stream);
  }
};

// What the backward of the branches fills: dP of a chunk of slots, which stays in the L2 cache between the kernels that
// write and read it, and partial results of the gradients of w, of the biases, and of V and U.
struct Workspace {
  const int64_t branches, chunk;
  const WeightTiling tiling;
  const Tensor dp, scale, heads, biases, weights;

  Workspace(const Call& call, const Kernels& kernels, const Outputs& outputs)
      : branches(call.p.gated ? 2 : 1),
        chunk(chunk_of(call, kernels.columns())),
        tiling(kernels.weight_tiling(outputs.wanted(kVWeight), outputs.wanted(kUWeight), chunk)),
        dp(call.empty({outputs.products() ? chunk * kSegmentRows : 0, kernels.columns()}, call.h.scalar_type())),
        scale(call.empty({2})),
        heads(parts_of_slots(call, outputs.wanted(kWWeight), int64_t{call.p.K} * call.p.L)),
        biases(parts_of_slots(call, outputs.biases(), branches * call.p.L)),
        weights(call.empty({outputs.weights() ? tiling.splits : 0, tiling.units, call.p.D})) {}

 private:
  static int64_t chunk_of(const Call& call, int64_t columns) {
    const int64_t slot_bytes = kSegmentRows * columns * call.h.element_size();
    return std::min(call.slots, chunk_slots(slot_bytes, call.stream.l2_bytes()));
  }
  static Tensor parts_of_slots(const Call& call, bool wanted, int64_t columns) {
    Tensor parts = call.empty({wanted ? call.slots : 0, columns});
    const bool ragged = call.p.bags.cu_seqlens != nullptr;  // leaves slots without a segment
    return ragged ? torch::stable::zero_(parts) : parts;
  }
};

void backward_of_branches(
    const Call& call, const Kernels& kernels, const ScoreGradient& gradient, const Outputs& outputs) {
  const Problem& p = call.p;
  const Workspace to(call, kernels, outputs);
  const bool scaled = p.type == Float::fp16;
  if (scaled) {
    branch_scale(
        {call.slots, p.K, p.L, p.activation, p.dropout.scale, p.weights.w, floats(gradient.largest), floats(to.scale)},
        call.stream);
  }
  for (int64_t first = 0; first < call.slots; first += to.chunk) {
    const BranchGradients dp{
        outputs.products() ? to.dp.mutable_data_ptr() : nullptr, scaled ? floats(to.scale) : nullptr, first,
        std::min(call.slots, first + to.chunk)};
    kernels.branch(
        {p, dp, floats(gradient.ds), outputs.wanted(kWWeight) ? floats(to.heads) : nullptr,
         outputs.biases() ? floats(to.biases) : nullptr});
    if (outputs.wanted(kH)) {
      void* grad_h = outputs.tensors[kH].mutable_data_ptr();
      kernels.row_gradient({p, dp, gradient.bits(), gradient.attention_data(), gradient.grad_data(), grad_h});
    }
    if (outputs.weights()) {
      kernels.weight_gradient({p, dp, gradient.bits(), floats(to.weights), to.tiling, first > 0});
    }
  }
  const int64_t L = p.L, D = p.D, K = p.K;
  outputs.add(kVWeight, floats(to.weights), to.tiling.splits, to.tiling.units * D);
  outputs.add(kUWeight, floats(to.weights) + (L - to.tiling.first_unit) * D, to.tiling.splits, to.tiling.units * D);
  outputs.add(kVBias, floats(to.biases), call.slots, to.branches * L);
  outputs.add(kUBias, floats(to.biases) + L, call.slots, to.branches * L);
  outputs.add(kWWeight, floats(to.heads), call.slots, K * L);
}

}  // namespace

std::tuple<Tensor, Tensor> forward(const Inputs& in, MakeKernels* make) {
  const Call call(in, make);
  const Tensor scores = call.empty_scores();
  return {pool(call, floats(scores)), scores};
}

Tensor scores(const Inputs& in, MakeKernels* make) {
  const Call call(in, make);
  const Tensor scores = call.empty_scores();
  if (call.p.bags.rows > 0) call.kernels()->forward({call.p, {}, nullptr, floats(scores), nullptr});
  return scores;
}

Gradients backward(
    const Optional& grad_pooled, const Optional& grad_scores, const Inputs& in, const Tensor& scores, int64_t needs,
    MakeKernels* make) {
  const Call call(in, make);
  const Outputs outputs(call, in, needs);
  if (call.p.bags.rows == 0) {
    for (Tensor none : outputs.tensors) torch::stable::zero_(none);
    return std::tuple_cat(outputs.tensors);
  }
  const std::unique_ptr<Kernels> kernels = call.kernels();
  const ScoreGradient gradient(call, *kernels, grad_pooled, grad_scores, scores);
  outputs.add(kWBias, floats(gradient.parts), call.slots, call.p.K);
  if (outputs.products() || outputs.biases() || outputs.wanted(kWWeight)) {
    backward_of_branches(call, *kernels, gradient, outputs);
  }
  return std::tuple_cat(outputs.tensors);
}

Tensor pool_by_scores(const Tensor& given, const Inputs& in) {
  const Tensor scores = torch::stable::contiguous(given);
  return pool(Call(in, generic_kernels), nullptr, floats(scores));
}

std::tuple<Tensor, Tensor> pool_by_scores_backward(
    const Tensor& grad_pooled, const Tensor& given, const Inputs& in, bool need_scores, bool need_h) {
  const Call call(in, generic_kernels);
  const Tensor grad_h = call.empty_grad_h(need_h), nothing = call.empty({0});
  if (call.p.bags.rows == 0) return {need_scores ? call.empty_scores() : nothing, grad_h};
  const std::unique_ptr<Kernels> kernels = call.kernels();
  const ScoreGradient gradient(call, *kernels, grad_pooled, std::nullopt, given);
  if (need_h) {
    kernels->row_gradient(
        {call.p,
         {nullptr, nullptr, 0, call.slots},
         gradient.bits(),
         gradient.attention_data(),
         gradient.grad_data(),
         grad_h.mutable_data_ptr()});
  }
  return {need_scores ? gradient.ds : nothing, grad_h};
}

}  // namespace ercn::pool
