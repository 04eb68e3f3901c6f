#pragma once
// What the backward of either pool begins with: the gradient ds of the scores, from that of pooled and that of scores.
#include <initializer_list>

#include "pool/column_sums.h"
#include "pool/inputs.h"
#include "pool/score_gradient.h"

namespace ercn::pool {

// fp32 scratch that lives as long as the operator's call.
inline float* floats(const Tensor& held) { return static_cast<float*>(held.mutable_data_ptr()); }
inline float* floats(bool wanted, const Tensor& held) { return wanted ? floats(held) : nullptr; }

// The gradients that are asked for, uninitialized, and empty tensors for the others.
class Wanted {
 public:
  Wanted(const Inputs& in, const Problem& p, int64_t needs)
      : given_{true, true, in.v_bias.has_value(), in.u_weight.has_value(), in.u_bias.has_value(), true,
               in.w_bias.has_value()},
        needs_(needs),
        grads{of(in.h, kH, in.cu_seqlens ? std::initializer_list<int64_t>{p.bags.rows, p.D}
                                         : std::initializer_list<int64_t>{p.bags.count, p.bags.n, p.D}),
              of(in.h, kVWeight, {p.L, p.D}), of(in.h, kVBias, {p.L}), of(in.h, kUWeight, {p.L, p.D}),
              of(in.h, kUBias, {p.L}), of(in.h, kWWeight, {p.K, p.L}), of(in.h, kWBias, {p.K})} {}

  bool operator()(Gradient which) const { return given_[which] && (needs_ >> which & 1) != 0; }

 private:
  Tensor of(const Tensor& h, Gradient which, std::initializer_list<int64_t> sizes) const {
    return (*this)(which) ? empty(h, sizes, h.scalar_type()) : empty(h, {0}, h.scalar_type());
  }

  const bool given_[7];
  const int64_t needs_;

 public:
  const Gradients grads;
};

// products(ĝ, q, parts, weighted) makes q = ĝ·h and the parts of every segment; by the kernels of either pool.
struct ScoreGradients {
  Optional grad_pooled;          // ĝ, aligned
  Tensor ds, attention;          // in the layout of scores; attention only with grad_pooled
  Tensor parts, largest, real;   // as score_gradient.h has them; largest for fp16 only

  template <typename Products>
  ScoreGradients(
      const Optional& given, const Optional& grad_scores, const Inputs& in, const Problem& p,
      const Tensor& saved_scores, const arch::Stream& stream, const Products& products)
      : grad_pooled(aligned(given)),
        ds(empty_scores(in.h, p)),
        attention(given ? empty_scores(in.h, p) : empty(in.h, {0}, ScalarType::Float)),
        parts(empty(in.h, {slot_count(p.bags), p.K}, ScalarType::Float)),
        largest(empty(in.h, {type_of(in.h) == Type::kFp16 ? slot_count(p.bags) : 0}, ScalarType::Float)),
        real(empty(in.h, {slot_count(p.bags), 2}, ScalarType::Int)) {
    const int64_t cells = slot_count(p.bags) * p.K, heads = p.bags.count * p.K;
    const Tensor scores = torch::stable::contiguous(saved_scores);
    const Tensor segments = empty(in.h, {3, cells}, ScalarType::Float);
    const Tensor bags = empty(in.h, {3, heads}, ScalarType::Float);
    ScoreGradient of{};
    of.scores = floats(scores), of.grad = floats(ds), of.parts = floats(parts), of.real = bits();
    of.largest = floats(type_of(in.h) == Type::kFp16, largest);
    if (grad_scores) {
      const bool ragged = in.cu_seqlens.has_value();
      of.grad_scores = static_cast<const float*>(grad_scores->const_data_ptr());
      of.grad_b = ragged ? 0 : grad_scores->stride(0);
      of.grad_k = grad_scores->stride(ragged ? 0 : 1);
      of.grad_n = grad_scores->stride(ragged ? 1 : 2);
    }
    if (grad_pooled) {
      const Parts softmax{floats(segments), floats(segments) + cells, nullptr};
      float* weighted = floats(segments) + 2 * cells;
      of.bags = {floats(bags), floats(bags) + heads, floats(bags) + 2 * heads};
      of.attention = floats(attention);
      products(grad_pooled->const_data_ptr(), of.scores, of.grad, softmax, weighted);
      combine_statistics(p, softmax, weighted, of.bags, stream);
    }
    score_gradient(p, of, stream);
  }

  uint32_t* bits() const { return static_cast<uint32_t*>(real.mutable_data_ptr()); }
};

}  // namespace ercn::pool
