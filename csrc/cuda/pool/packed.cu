#include "pool/packed.h"

#include <arch/convert.h>

namespace ercn::pool {
namespace {

// One thread: an element of the projections, or of biases and heads, which follow.
template <typename Element>
struct Pack {
  struct Params {
    Columns columns;
    int D, K;
    const Element *v, *v_bias, *u, *u_bias, *w;
    Packed<Element> to;
  };
  static constexpr int kThreads = 256, kMinBlocks = 1;

  ERCN_HOST_DEVICE static int64_t elements(const Params& p) {
    const int64_t columns = column_count(p.columns);
    return columns * p.to.depth + columns + int64_t{p.K} * padded_units(p.columns);
  }

  ERCN_DEVICE static void run(const Params& p, unsigned char*) {
    const int64_t columns = column_count(p.columns), units = padded_units(p.columns), L = p.columns.L;
    int64_t i = int64_t{arch::block_index().x} * kThreads + arch::thread_index();
    if (i < columns * p.to.depth) {
      const auto [branch, unit] = column_at(p.columns, static_cast<int>(i / p.to.depth));
      const int64_t d = i % p.to.depth;
      const bool exists = unit < L && d < p.D;
      p.to.projections[i] = exists ? (branch == 0 ? p.v : p.u)[unit * p.D + d] : arch::from_float<Element>(0);
      return;
    }
    i -= columns * p.to.depth;
    if (i < columns) {
      const auto [branch, unit] = column_at(p.columns, static_cast<int>(i));
      const Element* bias = branch == 0 ? p.v_bias : p.u_bias;
      p.to.biases[i] = bias != nullptr && unit < L ? arch::to_float(bias[unit]) : 0;
      return;
    }
    i -= columns;
    if (i >= p.K * units) return;
    const int64_t k = i / units, unit = i % units;
    p.to.heads[i] = unit < L ? arch::to_float(p.w[k * L + unit]) : 0;
  }
};

}  // namespace

template <typename Element>
void pack(const Problem& problem, const Weights& weights, const Packed<Element>& to, const arch::Stream& stream) {
  using Kernel = Pack<Element>;
  const auto elements = [](const void* of) { return static_cast<const Element*>(of); };
  const typename Kernel::Params params{
      {problem.L, weights.u != nullptr}, problem.D, problem.K, elements(weights.v), elements(weights.v_bias),
      elements(weights.u), elements(weights.u_bias), elements(weights.w), to};
  const int64_t blocks = arch::divide_up<int64_t>(Kernel::elements(params), Kernel::kThreads);
  arch::launch<Kernel>(params, {static_cast<int>(blocks)}, 0, stream);
}

template void pack(const Problem&, const Weights&, const Packed<float>&, const arch::Stream&);
template void pack(const Problem&, const Weights&, const Packed<arch::bf16>&, const arch::Stream&);
template void pack(const Problem&, const Weights&, const Packed<arch::fp16>&, const arch::Stream&);

}  // namespace ercn::pool
