// The operator by the generic kernels.
#include "pool/generic/pool.h"

#include "pool/driver.h"
#include "pool/generic/kernels.h"

namespace ercn::pool {
namespace {

class Generic {
 public:
  Generic(const Tensor& h, const Problem& p, const arch::Stream& stream) : p_(p), stream_(stream) {
    const int64_t count = columns(), heads = int64_t{p.K} * padded_units(columns_of(p));
    const int depth = arch::round_up(p.D, 32);
    projections_ = empty(h, {count, depth}, h.scalar_type());
    others_ = empty(h, {count + heads}, ScalarType::Float);
    packed_ = {projections_.mutable_data_ptr(), floats(others_), floats(others_) + count, depth};
    pack(p, packed_, stream);
  }

  void forward(const ForwardParams& p) const { pool::forward({p, packed_}, stream_); }
  void products(const ProductsParams& p) const { dots(p, stream_); }
  void branch(const BranchParams& p) const { pool::branch({p, packed_}, stream_); }
  void rows(const RowsParams& p) const { row_gradient({p, packed_}, stream_); }
  void weights(const WeightsParams& p) const { weight_gradient(p, stream_); }

  int64_t columns() const { return column_count(columns_of(p_)); }
  WeightShares shares(bool, bool, int64_t slots) const {
    const int blocks = static_cast<int>(columns()) / kGradientColumns * arch::divide_up(p_.D, kGradientChannels);
    const int splits = arch::divide_up(2 * stream_.multiprocessors(), std::max(blocks, 1));
    return {0, (p_.gated ? 2 : 1) * p_.L, blocks, static_cast<int>(std::min<int64_t>(splits, slots))};
  }

 private:
  const Problem& p_;
  const arch::Stream& stream_;
  Tensor projections_, others_;
  Packed packed_;
};

}  // namespace

std::tuple<Tensor, Tensor> forward(const Inputs& in) { return forward<Generic>(in); }

Tensor scores(const Inputs& in) { return scores<Generic>(in); }

Tensor pool_by_scores(const Tensor& given, const Inputs& in) {
  const arch::Stream stream(in.h);
  const Operands operands(in);
  const Tensor scores = torch::stable::contiguous(given);
  return pool_by<Generic>(in.h, operands.problem, stream, nullptr, floats(scores));
}

std::tuple<Tensor, Tensor> pool_by_scores_backward(
    const Tensor& grad_pooled, const Tensor& given, const Inputs& in, bool need_scores, bool need_h) {
  return backward_by<Generic>(grad_pooled, given, in, need_scores, need_h);
}

Gradients backward(
    const Optional& grad_pooled, const Optional& grad_scores, const Inputs& in, const Tensor& scores, int64_t needs) {
  return backward<Generic>(grad_pooled, grad_scores, in, scores, needs);
}

}  // namespace ercn::pool
