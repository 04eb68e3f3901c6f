#pragma once
// The operator's tensors as the kernels see them.
#include <cmath>
#include <optional>
#include <tuple>

#include "library.h"
#include "pool/problem.h"

namespace ercn::pool {

using Optional = std::optional<Tensor>;

struct Inputs {
  const Tensor &h, &v_weight;
  const Optional &v_bias, &u_weight, &u_bias;
  const Tensor& w_weight;
  const Optional &w_bias, &mask, &cu_seqlens, &seed;
  double dropout_p;
  Activation activation;
  bool exact;  // fp32 products to fp32's accuracy, not TF32's
};

// x, or a copy of it that is contiguous and begins at a multiple of 16 bytes.
inline Tensor aligned(const Tensor& x) {
  const Tensor made = torch::stable::contiguous(x);
  return reinterpret_cast<uintptr_t>(made.const_data_ptr()) % 16 == 0 ? made : torch::stable::clone(made);
}
inline Optional aligned(const Optional& x) { return x ? Optional(aligned(*x)) : std::nullopt; }

// The probability in steps of 2^-16, to even; none where it rounds to 0.
inline Dropout dropout_of(const Optional& seed, double p, bool gated) {
  const uint32_t threshold = static_cast<uint32_t>(std::nearbyint(p * 65536));
  if (threshold == 0) return {nullptr, 0, 1};
  const double kept = threshold < 65536 ? 65536.0 / (65536 - threshold) : 0;
  const float scale = static_cast<float>(gated ? kept * kept : kept);
  return {static_cast<const int64_t*>(seed->const_data_ptr()), (threshold << 16) - 1, scale};
}

// Holds the aligned weights and offsets that its problem points to.
class Operands {
 public:
  explicit Operands(const Inputs& in)
      : v_(aligned(in.v_weight)),
        w_(aligned(in.w_weight)),
        u_(aligned(in.u_weight)),
        v_bias_(aligned(in.v_bias)),
        u_bias_(aligned(in.u_bias)),
        w_bias_(aligned(in.w_bias)),
        cu_seqlens_(aligned(in.cu_seqlens)) {
    const Tensor& h = in.h;
    const bool ragged = cu_seqlens_.has_value();
    Problem& p = problem;
    p.bags.cu_seqlens = data(cu_seqlens_);
    p.bags.wide = ragged && cu_seqlens_->scalar_type() == ScalarType::Long;
    p.bags.count = ragged ? cu_seqlens_->size(0) - 1 : h.size(0);
    p.bags.n = ragged ? 0 : h.size(1);
    p.bags.rows = ragged ? h.size(0) : h.size(0) * h.size(1);
    p.D = static_cast<int>(h.size(h.dim() - 1));
    p.L = static_cast<int>(v_.size(0));
    p.K = static_cast<int>(w_.size(0));
    p.type = type_of(h);
    p.gated = u_.has_value();
    p.exact = in.exact;
    p.activation = in.activation;
    p.dropout = dropout_of(in.seed, in.dropout_p, p.gated);
    p.h = h.const_data_ptr();
    p.h_b = ragged ? 0 : h.stride(0);
    p.h_n = h.stride(h.dim() - 2);
    p.h_d = h.stride(h.dim() - 1);
    p.mask = in.mask ? static_cast<const bool*>(in.mask->const_data_ptr()) : nullptr;
    p.mask_b = in.mask ? in.mask->stride(0) : 0;
    p.mask_n = in.mask ? in.mask->stride(1) : 0;
    p.v = v_.const_data_ptr(), p.v_bias = data(v_bias_);
    p.u = data(u_), p.u_bias = data(u_bias_);
    p.w = w_.const_data_ptr(), p.w_bias = data(w_bias_);

    // Channels first is for maps whose rows can be read 16 bytes at a time; any other strides are read as rows, an
    // element at a time where not `vector`.
    const auto is_aligned = [&](int64_t stride) { return stride * h.element_size() % 16 == 0; };
    const bool start = reinterpret_cast<uintptr_t>(p.h) % 16 == 0 && (ragged || p.bags.count == 1 || is_aligned(p.h_b));
    p.channels_first = p.h_d != 1 && p.h_n == 1 && !ragged && start && is_aligned(p.h_d);
    p.vector = p.channels_first ||
               ((p.h_d == 1 || p.D == 1) && start && (h.size(h.dim() - 2) <= 1 || is_aligned(p.h_n)));
  }
  Operands(const Operands&) = delete;

  Problem problem;

 private:
  static const void* data(const Optional& x) { return x ? x->const_data_ptr() : nullptr; }

  const Tensor v_, w_;
  const Optional u_, v_bias_, u_bias_, w_bias_, cu_seqlens_;
};

// Gradients that are asked for: bits of `needs`, in the order of the operator's outputs.
enum Gradient { kH, kVWeight, kVBias, kUWeight, kUBias, kWWeight, kWBias };

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// scores of h, [B, K, N] or [K, T] in fp32.
inline Tensor empty_scores(const Tensor& h, const Problem& p) {
  return p.bags.cu_seqlens != nullptr ? empty(h, {p.K, p.bags.rows}, ScalarType::Float)
                                      : empty(h, {p.bags.count, p.K, p.bags.n}, ScalarType::Float);
}

}  // namespace ercn::pool
