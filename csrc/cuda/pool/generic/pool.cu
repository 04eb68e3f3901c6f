// The generic kernels behind the driver's interface, and the packing of the weights for them.
#include <arch/convert.h>

#include <algorithm>

#include "pool/driver.h"
#include "pool/generic/kernels.h"

namespace ercn::pool {
namespace {

// One thread: an element of the projections, or of biases and heads, which follow.
template <typename Element>
struct Pack {
  struct Params {
    Problem problem;
    Packed to;
  };
  static constexpr int kThreads = 256, kMinBlocks = 1;

  ERCN_DEVICE static void run(const Params& p, unsigned char*) {
    const Columns columns = columns_of(p.problem);
    const Weights& weights = p.problem.weights;
    const int64_t count = column_count(columns), units = padded_units(columns), L = p.problem.L, D = p.problem.D;
    const auto at = [](const void* data, int64_t i) { return static_cast<const Element*>(data)[i]; };
    int64_t i = int64_t{arch::block_index().x} * kThreads + arch::thread_index();
    if (i < count * p.to.depth) {
      const auto [branch, unit] = column_at(columns, static_cast<int>(i / p.to.depth));
      const int64_t d = i % p.to.depth;
      const bool exists = unit < L && d < D;
      static_cast<Element*>(p.to.projections)[i] =
          exists ? at(branch == 0 ? weights.v : weights.u, unit * D + d) : arch::from_float<Element>(0);
      return;
    }
    i -= count * p.to.depth;
    if (i < count) {
      const auto [branch, unit] = column_at(columns, static_cast<int>(i));
      const void* bias = branch == 0 ? weights.v_bias : weights.u_bias;
      p.to.biases[i] = bias != nullptr && unit < L ? arch::to_float(at(bias, unit)) : 0;
      return;
    }
    i -= count;
    if (i >= p.problem.K * units) return;
    const int64_t k = i / units, unit = i % units;
    p.to.heads[i] = unit < L ? arch::to_float(at(weights.w, k * L + unit)) : 0;
  }
};

class Generic : public Kernels {
 public:
  Generic(const Tensor& h, const Problem& p, const arch::Stream& stream) : p_(p), stream_(stream) {
    const int64_t heads = int64_t{p.K} * padded_units(columns_of(p));
    const int depth = arch::round_up(p.D, 32);
    projections_ = empty(h, {columns(), depth}, h.scalar_type());
    others_ = empty(h, {columns() + heads}, ScalarType::Float);
    packed_ = {projections_.mutable_data_ptr(), floats(others_), floats(others_) + columns(), depth};
    with_element(p.type, [&](auto element) {
      using Kernel = Pack<decltype(element)>;
      const int64_t blocks = arch::divide_up<int64_t>(columns() * (depth + 1) + heads, Kernel::kThreads);
      arch::launch<Kernel>({p, packed_}, {static_cast<int>(blocks)}, 0, stream);
    });
  }

  void forward(const ForwardParams& p) const override { pool::forward({p, packed_}, stream_); }
  void dots(const DotsParams& p) const override { pool::dots(p, stream_); }
  void branch(const BranchParams& p) const override { pool::branch({p, packed_}, stream_); }
  void row_gradient(const RowGradientParams& p) const override { pool::row_gradient({p, packed_}, stream_); }
  void weight_gradient(const WeightGradientParams& p) const override { pool::weight_gradient(p, stream_); }

  int64_t columns() const override { return column_count(columns_of(p_)); }
  WeightTiling weight_tiling(bool, bool, int64_t slots) const override {
    const int tiles = static_cast<int>(columns()) / kGradientColumns * arch::divide_up(p_.D, kGradientChannels);
    const int splits = arch::divide_up(2 * stream_.multiprocessors(), std::max(tiles, 1));
    return {0, (p_.gated ? 2 : 1) * p_.L, tiles, static_cast<int>(std::min<int64_t>(splits, slots))};
  }

 private:
  const Problem& p_;
  const arch::Stream& stream_;
  Tensor projections_, others_;
  Packed packed_;
};

}  // namespace

std::unique_ptr<Kernels> generic_kernels(const Tensor& h, const Problem& p, const arch::Stream& stream) {
  return std::make_unique<Generic>(h, p, stream);
}

}  // namespace ercn::pool
