// Launches the pool's kernels on Hopper.
#include "sm90/pool.h"

#include "pool/column_sums.h"
#include "pool/combine.h"
#include "pool/scale.h"
#include "pool/score_gradient.h"
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

// fp32 scratch that lives as long as the operator's call.
float* floats(const Tensor& held) { return static_cast<float*>(held.mutable_data_ptr()); }

}  // namespace

std::string cannot_pool(const pool::Inputs& in) {
  const Tensor& h = in.h;
  if (const int capability = arch::compute_capability(h); capability != 90) {
    return "the Hopper kernels of the pool need compute capability 9.0; this GPU has " + std::to_string(capability / 10) + "." +
           std::to_string(capability % 10);
  }
  if (!in.u_weight) return "the Hopper kernels of the pool are for gated attention; u_weight is None";
  if (h.scalar_type() != ScalarType::BFloat16 && h.scalar_type() != ScalarType::Half) {
    return "the Hopper kernels of the pool take bfloat16 and float16";
  }
  const int64_t D = h.size(h.dim() - 1), N = h.size(h.dim() - 2), L = in.v_weight.size(0), K = in.w_weight.size(0);
  if (D % kDepth != 0 || L % kDepth != 0 || D == 0 || D > kMaxSlabs * kDepth || L == 0 || K < 1 || K > kMaxHeads) {
    return "the Hopper kernels of the pool take D up to 3072 and L that are multiples of 64, and at most 8 heads; got D = " +
           std::to_string(D) + ", L = " + std::to_string(L) + ", K = " + std::to_string(K);
  }
  if (h.numel() / D > std::numeric_limits<int32_t>::max()) return "the Hopper kernels of the pool take at most 2^31 - 1 instances";
  const bool is_aligned = reinterpret_cast<uintptr_t>(h.const_data_ptr()) % 16 == 0;
  const int64_t rows = h.stride(h.dim() - 2), channels = h.stride(h.dim() - 1), bags = h.dim() == 3 && h.size(0) > 1 ? h.stride(0) : 8;
  const int64_t outer = channels == 1 ? (N > 1 ? rows : 8) : channels;
  if ((channels != 1 && rows != 1) || outer % 8 != 0 || outer <= 0 || bags % 8 != 0 || bags <= 0 || !is_aligned) {
    return "the copy engine reads h where channels or instances are contiguous and the other strides and the address are "
           "multiples of 16 bytes";
  }
  return "";
}

std::tuple<Tensor, Tensor> pool_forward(const pool::Inputs& in) {
  const arch::Stream stream(in.h);
  const pool::Operands operands(in);
  const pool::Problem& p = operands.problem;
  const pool::Type type = pool::type_of(in.h);
  const int64_t slots = slot_count(p.bags);
  const Tensor pooled = empty(in.h, {p.bags.count, p.K, p.D}, in.h.scalar_type());
  Tensor scores = pool::empty_scores(in.h, p);
  Tensor largest = empty(in.h, {slots, p.K}, ScalarType::Float), sum = empty(in.h, {slots, p.K}, ScalarType::Float);
  Tensor parts = empty(in.h, {slots, p.K, pool::pooled_width(p.D)}, ScalarType::Float);
  const pool::Parts of_segments{floats(largest), floats(sum), floats(parts)};
  if (p.bags.rows > 0) {
    const ProductMaps maps = with_maps(p, type, [&](const auto& of) { return of.product(operands.weights); });
    pool_forward({p, operands.weights, of_segments, floats(scores), maps}, type, is_channels_first(p), stream);
  }
  pool::combine(p, of_segments, pooled.mutable_data_ptr(), type, stream);
  return {pooled, scores};
}

pool::Gradients pool_backward(
    const pool::Optional& grad_pooled, const pool::Optional& grad_scores, const pool::Inputs& in, const Tensor& saved_scores,
    int64_t needs) {
  using namespace pool;
  const arch::Stream stream(in.h);
  const Operands operands(in);
  const Problem& p = operands.problem;
  const Type type = type_of(in.h);
  const bool channels_first = is_channels_first(p);
  const int64_t slots = slot_count(p.bags), L = p.L, D = p.D, K = p.K;
  const bool given[] = {true, true, in.v_bias.has_value(), true, in.u_bias.has_value(), true, in.w_bias.has_value()};
  const auto need = [&](Gradient which) { return given[which] && (needs >> which & 1) != 0; };
  const auto grad = [&](Gradient which, std::initializer_list<int64_t> sizes) {
    return need(which) ? empty(in.h, sizes, in.h.scalar_type()) : empty(in.h, {0}, in.h.scalar_type());
  };
  Tensor grad_h = in.cu_seqlens ? grad(kH, {p.bags.rows, D}) : grad(kH, {p.bags.count, p.bags.n, D});
  const Gradients grads{grad_h, grad(kVWeight, {L, D}), grad(kVBias, {L}), grad(kUWeight, {L, D}),
                        grad(kUBias, {L}), grad(kWWeight, {K, L}), grad(kWBias, {K})};
  const auto add_parts = [&](Gradient which, const float* parts, int64_t rows, int64_t stride, const Tensor& to) {
    if (need(which)) column_sums(parts, rows, stride, to.numel(), to.mutable_data_ptr(), type, stream);
  };
  const auto make = [&](std::initializer_list<int64_t> sizes) { return empty(in.h, sizes, ScalarType::Float); };
  if (p.bags.rows == 0) {
    std::apply([](auto... made) { (torch::stable::zero_(made), ...); }, grads);
    return grads;
  }

  // The gradient of scores.
  Tensor scores = torch::stable::contiguous(saved_scores), ds = pool::empty_scores(in.h, p);
  Tensor attention = grad_pooled ? pool::empty_scores(in.h, p) : make({0});
  Tensor segments = make({3, slots, K}), bags = make({3, p.bags.count, K});
  Tensor part_ds = make({slots, K}), largest = make({type == Type::kFp16 ? slots : 0});
  Tensor real = empty(in.h, {slots, 2}, ScalarType::Int);
  const Optional g = grad_pooled ? Optional(aligned(*grad_pooled)) : std::nullopt;
  const arch::TensorMap h = with_maps(p, type, [](const auto& of) { return of.instances(); });
  ScoreGradient of{floats(scores), nullptr, 0, 0, 0, {}, nullptr, floats(ds), floats(part_ds), nullptr,
                   static_cast<uint32_t*>(real.mutable_data_ptr())};
  if (type == Type::kFp16) of.largest = floats(largest);
  if (grad_scores) {
    const bool ragged = in.cu_seqlens.has_value();
    of.grad_scores = static_cast<const float*>(grad_scores->const_data_ptr());
    of.grad_b = ragged ? 0 : grad_scores->stride(0);
    of.grad_k = grad_scores->stride(ragged ? 0 : 1);
    of.grad_n = grad_scores->stride(ragged ? 1 : 2);
  }
  if (g) {
    float* part = floats(segments);
    const Parts parts{part, part + slots * K, nullptr};
    float *weighted = part + 2 * slots * K, *bag = floats(bags);
    of.bags = {bag, bag + p.bags.count * K, bag + 2 * p.bags.count * K};
    of.attention = floats(attention);
    pool_products({p, g->const_data_ptr(), floats(scores), floats(ds), parts, weighted, h}, type, channels_first, stream);
    combine_statistics(p, parts, weighted, of.bags, stream);
  }
  score_gradient(p, of, stream);
  add_parts(kWBias, floats(part_ds), slots, K, std::get<kWBias>(grads));

  // The branches, whose gradients dP are held for a chunk of segments.
  const bool need_biases = need(kVBias) || need(kUBias), need_weights = need(kVWeight) || need(kUWeight);
  if (!need(kH) && !need_weights && !need_biases && !need(kWWeight)) return grads;
  const auto parts_of = [&](bool wanted, int64_t columns) {
    Tensor made = make({wanted ? slots : 0, columns});
    // Ragged bags leave slots without a segment.
    return in.cu_seqlens ? torch::stable::zero_(made) : made;
  };
  Tensor part_heads = parts_of(need(kWWeight), K * L), part_bias = parts_of(need_biases, 2 * L);
  const bool need_branches = need(kH) || need_weights;
  const int64_t held = std::min(slots, chunk_slots(L, stream.l2_bytes()));
  Tensor branch_grads = empty(in.h, {need_branches ? held * kSegmentRows : 0, 2 * L}, in.h.scalar_type()), scale = make({2});
  if (type == Type::kFp16) {
    branch_scale(floats(largest), slots, operands.weights.w, K * L, static_cast<int>(K), floats(scale), stream);
  }
  const WeightShares shares =
      weight_shares(need(kVWeight), need(kUWeight), static_cast<int>(L), static_cast<int>(D), held, stream.multiprocessors());
  Tensor part_weights = make({shares.splits, shares.units, D});
  const auto or_null = [](bool wanted, Tensor& x) { return wanted ? floats(x) : nullptr; };
  const float* scale_of = or_null(type == Type::kFp16, scale);
  BranchParams branch{p, operands.weights, floats(ds), need_branches ? branch_grads.mutable_data_ptr() : nullptr, scale_of,
                      or_null(need(kWWeight), part_heads), or_null(need_biases, part_bias), 0, 0, {}};
  RowsParams rows{p, or_null(g.has_value(), attention), g ? g->const_data_ptr() : nullptr, scale_of,
                  need(kH) ? grad_h.mutable_data_ptr() : nullptr, 0, 0, {}, {}, {}};
  WeightsParams weights{p, of.real, scale_of, floats(part_weights), shares.first_unit, shares.units, shares.blocks,
                        shares.splits, false, 0, 0, {}, h};
  with_maps(p, type, [&](const auto& of) {
    branch.maps = of.product(operands.weights);
    if (!need_branches) return;
    rows.branch_grads = weights.branch_grads = of.matrix(branch.branch_grads, held * kSegmentRows, 2 * L, kSegmentRows);
    rows.v = of.matrix(operands.weights.v, L, D, kDepth);
    rows.u = of.matrix(operands.weights.u, L, D, kDepth);
  });
  for (int64_t first = 0; first < slots; first += held) {
    const int64_t last = std::min(slots, first + held);
    branch.first_slot = rows.first_slot = weights.first_slot = first;
    branch.last_slot = rows.last_slot = weights.last_slot = last;
    weights.accumulate = first > 0;
    pool_branch(branch, type, channels_first, stream);
    if (need(kH)) pool_rows(rows, type, stream);
    if (need_weights) pool_weights(weights, type, channels_first, stream);
  }
  const int64_t outputs = shares.units * D;
  add_parts(kVWeight, floats(part_weights), shares.splits, outputs, std::get<kVWeight>(grads));
  add_parts(kUWeight, floats(part_weights) + (L - shares.first_unit) * D, shares.splits, outputs, std::get<kUWeight>(grads));
  add_parts(kVBias, floats(part_bias), slots, 2 * L, std::get<kVBias>(grads));
  add_parts(kUBias, floats(part_bias) + L, slots, 2 * L, std::get<kUBias>(grads));
  add_parts(kWWeight, floats(part_heads), slots, K * L, std::get<kWWeight>(grads));
  return grads;
}

}  // namespace ercn::sm90
