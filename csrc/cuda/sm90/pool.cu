// Launches the pool's kernels on Hopper.
#include "sm90/pool.h"

#include "pool/combine.h"
#include "sm90/pool_kernels.h"

namespace ercn::sm90 {
namespace {

bool is_channels_first(const pool::Problem& p) { return p.h_d != 1; }

template <typename Element>
ProductMaps maps_of(const pool::Problem& p, const pool::Weights& weights) {
  constexpr int64_t kBytes = sizeof(Element);
  const bool ragged = p.bags.cu_seqlens != nullptr;
  const int64_t bags = ragged ? 1 : p.bags.count, rows = ragged ? p.bags.rows : p.bags.n;
  const int64_t bag_bytes = bags > 1 ? p.h_b * kBytes : 16;  // one bag has no next one
  constexpr arch::Swizzle kSwizzle = arch::Swizzle::k128;
  const auto weight = [&](const void* of) {
    return arch::make_tensor_map<Element, 3>(
        of, {p.D, p.L, 1}, {p.D * kBytes, p.L * p.D * kBytes}, {kDepth, kUnits, 1}, kSwizzle);
  };
  const auto instances = [&] {
    if (is_channels_first(p)) {
      return arch::make_tensor_map<Element, 3>(
          p.h, {rows, p.D, bags}, {p.h_d * kBytes, bag_bytes}, {kSegmentRows, kDepth, 1}, kSwizzle);
    }
    const int64_t row_bytes = rows > 1 ? p.h_n * kBytes : 16;
    return arch::make_tensor_map<Element, 3>(
        p.h, {p.D, rows, bags}, {row_bytes, bag_bytes}, {kDepth, kSegmentRows, 1}, kSwizzle);
  };
  return {instances(), weight(weights.v), weight(weights.u)};
}

ProductMaps maps_of(const pool::Problem& p, const pool::Weights& weights, ScalarType type) {
  return type == ScalarType::BFloat16 ? maps_of<arch::bf16>(p, weights) : maps_of<arch::fp16>(p, weights);
}

// fp32 scratch that lives as long as the operator's call.
float* floats(Tensor& held) { return static_cast<float*>(held.mutable_data_ptr()); }

}  // namespace

std::string cannot_pool(const pool::Inputs& in) {
  const Tensor& h = in.h;
  if (!in.u_weight) return "the Hopper kernels of the pool are for gated attention; u_weight is None";
  if (h.scalar_type() != ScalarType::BFloat16 && h.scalar_type() != ScalarType::Half) {
    return "the Hopper kernels of the pool take bfloat16 and float16";
  }
  const int64_t D = h.size(h.dim() - 1), N = h.size(h.dim() - 2), L = in.v_weight.size(0), K = in.w_weight.size(0);
  if (D % kDepth != 0 || L % kDepth != 0 || D == 0 || L == 0 || K < 1 || K > kMaxHeads) {
    return "the Hopper kernels of the pool take D and L that are multiples of 64 and at most 8 heads; got D = " +
           std::to_string(D) + ", L = " + std::to_string(L) + ", K = " + std::to_string(K);
  }
  if (h.numel() / D > std::numeric_limits<int32_t>::max()) return "the Hopper kernels of the pool take at most 2^31 - 1 instances";
  const auto is_aligned = [](const std::optional<Tensor>& x) {
    return !x || reinterpret_cast<uintptr_t>(x->const_data_ptr()) % 16 == 0;
  };
  const int64_t rows = h.stride(h.dim() - 2), channels = h.stride(h.dim() - 1), bags = h.dim() == 3 && h.size(0) > 1 ? h.stride(0) : 8;
  const int64_t outer = channels == 1 ? (N > 1 ? rows : 8) : channels;
  if ((channels != 1 && rows != 1) || outer % 8 != 0 || outer <= 0 || bags % 8 != 0 || bags <= 0 || !is_aligned(h)) {
    return "the copy engine reads h where channels or instances are contiguous and the other strides and the address are "
           "multiples of 16 bytes";
  }
  for (const std::optional<Tensor>& x : {std::optional(in.v_weight), in.v_bias, in.u_weight, in.u_bias, std::optional(in.w_weight)}) {
    if (!is_aligned(x)) return "the Hopper kernels of the pool read weights at multiples of 16 bytes";
  }
  return "";
}

std::tuple<Tensor, Tensor> pool_forward(const pool::Inputs& in) {
  const arch::Stream stream(in.h);
  const pool::Operands operands(in);
  const pool::Problem& p = operands.problem;
  const int64_t slots = slot_count(p.bags);
  const Tensor pooled = empty(in.h, {p.bags.count, p.K, p.D}, in.h.scalar_type());
  Tensor scores = pool::empty_scores(in.h, p);
  Tensor largest = empty(in.h, {slots, p.K}, ScalarType::Float), sum = empty(in.h, {slots, p.K}, ScalarType::Float);
  Tensor parts = empty(in.h, {slots, p.K, pool::pooled_width(p.D)}, ScalarType::Float);
  const pool::Parts of_segments{floats(largest), floats(sum), floats(parts)};
  if (p.bags.rows > 0) {
    pool_forward(
        {p, operands.weights, of_segments, floats(scores), maps_of(p, operands.weights, in.h.scalar_type())},
        in.h.scalar_type(), is_channels_first(p), stream);
  }
  pool::combine(p, of_segments, pooled, stream);
  return {pooled, scores};
}

}  // namespace ercn::sm90
