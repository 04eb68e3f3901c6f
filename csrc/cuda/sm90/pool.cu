// Launches the pool's kernels on Hopper.
#include "sm90/pool.h"

#include "pool/backward.h"
#include "pool/combine.h"
#include "pool/scale.h"
#include "sm90/pool_kernels.h"

namespace ercn::sm90 {
namespace {

bool is_channels_first(const pool::Problem& p) { return p.h_d != 1; }

// Tensor maps of the pool's operands.
template <typename Element>
struct Maps {
  static constexpr int64_t kBytes = sizeof(Element);
  static constexpr arch::Swizzle kSwizzle = arch::Swizzle::k128;
  const pool::Problem& p;

  // h as [B, N, D], or [1, T, D].
  arch::TensorMap instances() const {
    const bool ragged = p.bags.cu_seqlens != nullptr;
    const int64_t bags = ragged ? 1 : p.bags.count, rows = ragged ? p.bags.rows : p.bags.n;
    const int64_t bag_bytes = bags > 1 ? p.h_b * kBytes : 16;  // one bag has no next one
    if (is_channels_first(p)) {
      return arch::make_tensor_map<Element, 3>(
          p.h, {rows, p.D, bags}, {p.h_d * kBytes, bag_bytes}, {kSegmentRows, kDepth, 1}, kSwizzle);
    }
    const int64_t row_bytes = rows > 1 ? p.h_n * kBytes : p.D * kBytes;
    return arch::make_tensor_map<Element, 3>(
        p.h, {p.D, rows, bags}, {row_bytes, bag_bytes}, {kDepth, kSegmentRows, 1}, kSwizzle);
  }
  // A matrix [rows, columns] in boxes of `box` rows and 64 columns.
  arch::TensorMap matrix(const void* of, int64_t rows, int64_t columns, int box) const {
    return arch::make_tensor_map<Element, 2>(of, {columns, rows}, {columns * kBytes}, {kDepth, box}, kSwizzle);
  }
  ProductMaps product(const pool::Weights& weights) const {
    return {instances(), matrix(weights.v, p.L, p.D, kUnits), matrix(weights.u, p.L, p.D, kUnits)};
  }
};

template <typename Function>
auto with_maps(const pool::Problem& p, pool::Type type, const Function& function) {
  return type == pool::Type::kBf16 ? function(Maps<arch::bf16>{p}) : function(Maps<arch::fp16>{p});
}

}  // namespace

std::string cannot_pool(const pool::Inputs& in) {
  const Tensor& h = in.h;
  if (const int capability = arch::compute_capability(h); capability != 90) {
    return "the Hopper kernels of the pool need compute capability 9.0; this GPU has " +
           std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  }
  if (!in.u_weight) return "the Hopper kernels of the pool are for gated attention; u_weight is None";
  if (h.scalar_type() != ScalarType::BFloat16 && h.scalar_type() != ScalarType::Half) {
    return "the Hopper kernels of the pool take bfloat16 and float16";
  }
  const int64_t D = h.size(h.dim() - 1), N = h.size(h.dim() - 2), L = in.v_weight.size(0), K = in.w_weight.size(0);
  if (D % kDepth != 0 || L % kDepth != 0 || D == 0 || D > kMaxSlabs * kDepth || L == 0 || K < 1 || K > kMaxHeads) {
    return "the Hopper kernels of the pool take D up to 3072 and L that are multiples of 64, and at most 8 heads; "
           "got D = " + std::to_string(D) + ", L = " + std::to_string(L) + ", K = " + std::to_string(K);
  }
  if (h.numel() / D > std::numeric_limits<int32_t>::max()) {
    return "the Hopper kernels of the pool take at most 2^31 - 1 instances";
  }
  const bool is_aligned = reinterpret_cast<uintptr_t>(h.const_data_ptr()) % 16 == 0;
  const int64_t rows = h.stride(h.dim() - 2), channels = h.stride(h.dim() - 1);
  const int64_t bags = h.dim() == 3 && h.size(0) > 1 ? h.stride(0) : 8;
  const int64_t outer = channels == 1 ? (N > 1 ? rows : 8) : channels;
  if ((channels != 1 && rows != 1) || outer % 8 != 0 || outer <= 0 || bags % 8 != 0 || bags <= 0 || !is_aligned) {
    return "the copy engine reads h where channels or instances are contiguous and the other strides and the address "
           "are multiples of 16 bytes";
  }
  return "";
}

std::tuple<Tensor, Tensor> pool_forward(const pool::Inputs& in) {
  const arch::Stream stream(in.h);
  const pool::Operands operands(in);
  const pool::Problem& p = operands.problem;
  const pool::Type type = pool::type_of(in.h);
  const int64_t slots = slot_count(p.bags);
  const Tensor pooled = empty(in.h, {p.bags.count, p.K, p.D}, in.h.scalar_type()), scores = pool::empty_scores(in.h, p);
  const Tensor softmax = empty(in.h, {2, slots, p.K}, ScalarType::Float);
  const Tensor sums = empty(in.h, {slots, p.K, pool::pooled_width(p.D)}, ScalarType::Float);
  const pool::Parts parts{pool::floats(softmax), pool::floats(softmax) + slots * p.K, pool::floats(sums)};
  if (p.bags.rows > 0) {
    const ProductMaps maps = with_maps(p, type, [&](const auto& of) { return of.product(operands.weights); });
    pool_forward({p, operands.weights, parts, pool::floats(scores), maps}, type, is_channels_first(p), stream);
  }
  pool::combine(p, parts, pooled.mutable_data_ptr(), type, stream);
  return {pooled, scores};
}

pool::Gradients pool_backward(
    const pool::Optional& grad_pooled, const pool::Optional& grad_scores, const pool::Inputs& in, const Tensor& scores,
    int64_t needs) {
  using namespace pool;
  const arch::Stream stream(in.h);
  const Operands operands(in);
  const Problem& p = operands.problem;
  const Type type = type_of(in.h);
  const bool channels_first = is_channels_first(p);
  const int64_t slots = slot_count(p.bags), L = p.L, D = p.D, K = p.K;
  const Wanted wanted(in, p, needs);
  if (p.bags.rows == 0) {
    std::apply([](auto... grads) { (torch::stable::zero_(grads), ...); }, wanted.grads);
    return wanted.grads;
  }
  const auto add_parts = [&](Gradient which, const Tensor& to, const float* parts, int64_t rows, int64_t stride) {
    if (wanted(which)) column_sums(parts, rows, stride, to.numel(), to.mutable_data_ptr(), type, stream);
  };

  const arch::TensorMap h = with_maps(p, type, [](const auto& of) { return of.instances(); });
  const ScoreGradients of(
      grad_pooled, grad_scores, in, p, scores, stream,
      [&](const void* grad, const float* scores, float* q, const Parts& parts, float* weighted) {
        pool_products({p, grad, scores, q, parts, weighted, h}, type, channels_first, stream);
      });
  add_parts(kWBias, std::get<kWBias>(wanted.grads), floats(of.parts), slots, K);

  const bool need_biases = wanted(kVBias) || wanted(kUBias), need_weights = wanted(kVWeight) || wanted(kUWeight);
  const bool need_branches = wanted(kH) || need_weights;
  if (!need_branches && !need_biases && !wanted(kWWeight)) return wanted.grads;
  const auto make = [&](std::initializer_list<int64_t> sizes) { return empty(in.h, sizes, ScalarType::Float); };
  const auto parts_of_slots = [&](bool made, int64_t columns) {
    Tensor parts = make({made ? slots : 0, columns});
    return in.cu_seqlens ? torch::stable::zero_(parts) : parts;  // ragged bags leave slots without a segment
  };
  const Tensor part_heads = parts_of_slots(wanted(kWWeight), K * L), part_biases = parts_of_slots(need_biases, 2 * L);
  const int64_t held = std::min(slots, chunk_slots(L, stream.l2_bytes()));
  const Tensor branch_grads = empty(in.h, {need_branches ? held * kSegmentRows : 0, 2 * L}, in.h.scalar_type());
  const WeightShares shares =
      weight_shares(wanted(kVWeight), wanted(kUWeight), p.L, p.D, held, stream.multiprocessors());
  const Tensor part_weights = make({shares.splits, shares.units, D}), scale = make({2});
  if (type == Type::kFp16) {
    branch_scale(floats(of.largest), slots, operands.weights.w, K * L, p.K, floats(scale), stream);
  }
  const float* scale_of = floats(type == Type::kFp16, scale);

  BranchParams branch{};
  branch.problem = p, branch.weights = operands.weights, branch.score_grad = floats(of.ds), branch.scale = scale_of;
  branch.branch_grads = need_branches ? branch_grads.mutable_data_ptr() : nullptr;
  branch.part_heads = floats(wanted(kWWeight), part_heads), branch.part_bias = floats(need_biases, part_biases);
  RowsParams rows{};
  rows.problem = p, rows.scale = scale_of, rows.grad_h = std::get<kH>(wanted.grads).mutable_data_ptr();
  rows.attention = floats(grad_pooled.has_value(), of.attention);
  rows.grad_pooled = grad_pooled ? of.grad_pooled->const_data_ptr() : nullptr;
  WeightsParams weights{};
  weights.problem = p, weights.real = of.bits(), weights.scale = scale_of, weights.parts = floats(part_weights);
  weights.shares = shares, weights.h = h;
  with_maps(p, type, [&](const auto& of) {
    branch.maps = of.product(operands.weights);
    if (!need_branches) return;
    rows.branch_grads = of.matrix(branch.branch_grads, held * kSegmentRows, 2 * L, kSegmentRows);
    rows.v = of.matrix(operands.weights.v, L, D, kDepth), rows.u = of.matrix(operands.weights.u, L, D, kDepth);
    weights.branch_grads = rows.branch_grads;
  });
  for (int64_t first = 0; first < slots; first += held) {
    branch.first_slot = rows.first_slot = weights.first_slot = first;
    branch.last_slot = rows.last_slot = weights.last_slot = std::min(slots, first + held);
    weights.accumulate = first > 0;
    pool_branch(branch, type, channels_first, stream);
    if (wanted(kH)) pool_rows(rows, type, stream);
    if (need_weights) pool_weights(weights, type, channels_first, stream);
  }
  const int64_t outputs = shares.units * D;
  const float* part_u = floats(part_weights) + (L - shares.first_unit) * D;
  add_parts(kVWeight, std::get<kVWeight>(wanted.grads), floats(part_weights), shares.splits, outputs);
  add_parts(kUWeight, std::get<kUWeight>(wanted.grads), part_u, shares.splits, outputs);
  add_parts(kVBias, std::get<kVBias>(wanted.grads), floats(part_biases), slots, 2 * L);
  add_parts(kUBias, std::get<kUBias>(wanted.grads), floats(part_biases) + L, slots, 2 * L);
  add_parts(kWWeight, std::get<kWWeight>(wanted.grads), floats(part_heads), slots, K * L);
  return wanted.grads;
}

}  // namespace ercn::sm90
