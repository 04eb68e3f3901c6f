#pragma once
// The operator's arguments, and the problem that they pose to the kernels.
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "library.h"
#include "pool/problem.h"

namespace ercn::pool {

using Optional = std::optional<Tensor>;

// The operands in the order of the schemas; and whether fp32 products have fp32's accuracy, not TF32's.
struct Inputs {
  const Tensor &h, &v_weight;
  const Optional &v_bias, &u_weight, &u_bias;
  const Tensor& w_weight;
  const Optional &w_bias, &mask, &cu_seqlens, &seed;
  double dropout_p;
  std::string activation;
  bool exact = false;

  bool ragged() const { return cu_seqlens.has_value(); }
};

inline Activation activation_of(const std::string& name) {
  STD_TORCH_CHECK(
      name == "tanh" || name == "relu" || name == "gelu", "activations are tanh, relu and gelu; got ", name);
  return name == "tanh" ? Activation::kTanh : name == "relu" ? Activation::kRelu : Activation::kGelu;
}

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

// The problem, and the aligned weights and offsets that it points to.
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
    problem.bags = bags(in);
    problem.D = static_cast<int>(in.h.size(in.h.dim() - 1));
    problem.L = static_cast<int>(v_.size(0));
    problem.K = static_cast<int>(w_.size(0));
    problem.type = type_of(in.h);
    problem.gated = u_.has_value();
    problem.exact = in.exact;
    problem.activation = activation_of(in.activation);
    problem.dropout = dropout_of(in.seed, in.dropout_p, problem.gated);
    problem.h = instances(in, problem.bags);
    if (in.mask) {
      problem.mask = {static_cast<const bool*>(in.mask->const_data_ptr()), in.mask->stride(0), in.mask->stride(1)};
    }
    problem.weights = {v_.const_data_ptr(), data(v_bias_), data(u_), data(u_bias_), w_.const_data_ptr(), data(w_bias_)};
  }
  Operands(const Operands&) = delete;

  Problem problem{};

 private:
  Bags bags(const Inputs& in) const {
    const Tensor& h = in.h;
    if (!in.ragged()) return {nullptr, false, h.size(0), h.size(1), h.size(0) * h.size(1)};
    const bool wide = cu_seqlens_->scalar_type() == ScalarType::Long;
    return {cu_seqlens_->const_data_ptr(), wide, cu_seqlens_->size(0) - 1, 0, h.size(0)};
  }

  // Channels first is for maps whose rows can be read 16 bytes at a time. All other strides are read as rows, by single
  // elements where not `vector`.
  static Instances instances(const Inputs& in, const Bags& bags) {
    const Tensor& h = in.h;
    const int64_t N = h.size(h.dim() - 2), D = h.size(h.dim() - 1);
    const int64_t stride_b = in.ragged() ? 0 : h.stride(0), stride_n = h.stride(h.dim() - 2);
    const int64_t stride_d = h.stride(h.dim() - 1);
    const auto is_aligned = [&](int64_t stride) { return stride * h.element_size() % 16 == 0; };
    const bool start = reinterpret_cast<uintptr_t>(h.const_data_ptr()) % 16 == 0 &&
                       (in.ragged() || bags.count == 1 || is_aligned(stride_b));
    const bool channels_first = stride_d != 1 && stride_n == 1 && !in.ragged() && start && is_aligned(stride_d);
    const bool rows = (stride_d == 1 || D == 1) && start && (N <= 1 || is_aligned(stride_n));
    return {h.const_data_ptr(), stride_b, stride_n, stride_d, channels_first, channels_first || rows};
  }

  static const void* data(const Optional& x) { return x ? x->const_data_ptr() : nullptr; }

  const Tensor v_, w_;
  const Optional u_, v_bias_, u_bias_, w_bias_, cu_seqlens_;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// fp32 in memory that lives as long as the operator's call.
inline float* floats(const Tensor& held) { return static_cast<float*>(held.mutable_data_ptr()); }

}  // namespace ercn::pool
