#pragma once
// The tensors of the pool's operators, in types that have kernels, and their checks.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../convert.h"

namespace ercn {

using Optional = std::optional<Tensor>;

inline ScalarType sums_of(const Tensor& h) {
  return h.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Instances [B, N, D] with an optional mask [B, N], or [T, D] with cu_seqlens.
struct BagInputs {
  const Tensor& h;
  const Optional &mask, &cu_seqlens;

  int64_t dim() const { return h.size(cu_seqlens ? 1 : 2); }
  int64_t bags() const { return cu_seqlens ? cu_seqlens->size(0) - 1 : h.size(0); }
  // A tensor of scores' shape, [B, K, N] or [K, T], and one of h's.
  Tensor empty_scores(int64_t heads) const {
    return cu_seqlens ? torch::stable::new_empty(h, {heads, h.size(0)}, sums_of(h))
                      : torch::stable::new_empty(h, {h.size(0), heads, h.size(1)}, sums_of(h));
  }
  Tensor empty_h() const {
    return cu_seqlens ? torch::stable::new_empty(h, {h.size(0), h.size(1)})
                      : torch::stable::new_empty(h, {h.size(0), h.size(1), h.size(2)});
  }
};

// In the order of the operators' schemas.
struct PoolInputs {
  Tensor h, v_weight;
  Optional v_bias, u_weight, u_bias;
  Tensor w_weight;
  Optional w_bias, mask, cu_seqlens, seed;
  double dropout_p;
  std::string activation;

  BagInputs bags() const { return {h, mask, cu_seqlens}; }
  int64_t heads() const { return w_weight.size(0); }

  // pooled's type.
  ScalarType promoted() const {
    return h.scalar_type() == v_weight.scalar_type() ? h.scalar_type() : type_of_sums(h, v_weight);
  }

  // Converts to types that have kernels.
  void convert() {
    if (h.scalar_type() == v_weight.scalar_type() && h.scalar_type() != ScalarType::Half) return;
    const ScalarType sums = type_of_sums(h, v_weight);
    h = accepted(h, sums);
    for (Tensor* x : {&v_weight, &w_weight}) *x = converted(*x, sums);
    for (Optional* x : {&v_bias, &u_weight, &u_bias, &w_bias}) {
      if (*x) *x = converted(**x, sums);
    }
  }
};

// Gradients, in the order of the operator's outputs.
enum Gradient { kH, kVWeight, kVBias, kUWeight, kUBias, kWWeight, kWBias };
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline void check(const BagInputs& in) {
  const ScalarType type = in.h.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16,
      "instances must be float32, float64 or bfloat16");
  STD_TORCH_CHECK(in.h.is_cpu(), "instances must be on the CPU");
  STD_TORCH_CHECK(in.h.dim() == (in.cu_seqlens ? 2 : 3), "instances must be [B, N, D], or [T, D] with cu_seqlens");
  if (in.mask) {
    STD_TORCH_CHECK(
        !in.cu_seqlens && in.mask->is_cpu() && in.mask->scalar_type() == ScalarType::Bool && in.mask->dim() == 2 &&
            in.mask->size(0) == in.h.size(0) && in.mask->size(1) == in.h.size(1),
        "mask must be bool [B, N] on the CPU, of dense bags");
  }
  if (in.cu_seqlens) {
    const ScalarType index = in.cu_seqlens->scalar_type();
    STD_TORCH_CHECK(
        in.cu_seqlens->is_cpu() && in.cu_seqlens->dim() == 1 && in.cu_seqlens->size(0) > 0 &&
            (index == ScalarType::Int || index == ScalarType::Long),
        "cu_seqlens must be int32 or int64 [B + 1] on the CPU");
  }
}

inline void check(const PoolInputs& in) {
  check(in.bags());
  const ScalarType type = in.v_weight.scalar_type();
  STD_TORCH_CHECK(
      type == in.h.scalar_type() || (type == ScalarType::Float && in.h.scalar_type() == ScalarType::BFloat16),
      "the weights must have h's dtype, or be float32 beside bfloat16");
  const int64_t D = in.bags().dim(), L = in.v_weight.dim() == 2 ? in.v_weight.size(0) : -1;
  const int64_t K = in.w_weight.dim() == 2 ? in.w_weight.size(0) : -1;
  const auto require = [&](const Optional& x, const char* name, std::vector<int64_t> sizes) {
    if (!x) return;
    bool fits = x->is_cpu() && x->scalar_type() == type && x->dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = x->size(i) == sizes[i];
    STD_TORCH_CHECK(fits, name, " must be on the CPU, of v_weight's dtype, and fit D = ", D, ", L = ", L, ", K = ", K);
  };
  require(in.v_weight, "v_weight", {L, D});
  require(in.v_bias, "v_bias", {L});
  require(in.u_weight, "u_weight", {L, D});
  require(in.u_bias, "u_bias", {L});
  require(in.w_weight, "w_weight", {K, L});
  require(in.w_bias, "w_bias", {K});
  STD_TORCH_CHECK(
      !in.seed || (in.seed->is_cpu() && in.seed->scalar_type() == ScalarType::Long && in.seed->numel() == 1),
      "seed must be int64 [1] on the CPU");
  STD_TORCH_CHECK(in.dropout_p >= 0 && in.dropout_p <= 1, "dropout_p must be from 0 to 1");
  STD_TORCH_CHECK(in.dropout_p == 0 || in.seed, "dropout needs a seed");
}

inline void check_scores(const BagInputs& in, const Tensor& scores, int64_t heads) {
  STD_TORCH_CHECK(
      scores.is_cpu() && scores.is_contiguous() && scores.scalar_type() == sums_of(in.h) &&
          scores.dim() == (in.cu_seqlens ? 2 : 3) && scores.size(in.cu_seqlens ? 0 : 1) == heads &&
          scores.size(in.cu_seqlens ? 1 : 2) == in.h.size(in.cu_seqlens ? 0 : 1) &&
          (in.cu_seqlens || scores.size(0) == in.h.size(0)),
      "scores must be contiguous [B, K, N] or [K, T] in the dtype of the sums");
}

inline void check_grad_pooled(const BagInputs& in, const Tensor& grad, int64_t heads, ScalarType type) {
  STD_TORCH_CHECK(
      grad.is_cpu() && grad.scalar_type() == type && grad.dim() == 3 && grad.size(0) == in.bags() &&
          grad.size(1) == heads && grad.size(2) == in.dim(),
      "grad_pooled must have pooled's shape and dtype");
}

inline void check_grad_scores(const Tensor& grad, const Tensor& scores) {
  STD_TORCH_CHECK(
      grad.is_cpu() && grad.scalar_type() == scores.scalar_type() && grad.dim() == scores.dim() &&
          grad.numel() == scores.numel(),
      "grad_scores must have scores' shape and dtype");
}

}  // namespace ercn
