#include <arch/convert.h>

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
    const int64_t count = column_count(columns), units = padded_units(columns), L = p.problem.L, D = p.problem.D;
    const auto at = [](const void* of, int64_t i) { return static_cast<const Element*>(of)[i]; };
    int64_t i = int64_t{arch::block_index().x} * kThreads + arch::thread_index();
    if (i < count * p.to.depth) {
      const auto [branch, unit] = column_at(columns, static_cast<int>(i / p.to.depth));
      const int64_t d = i % p.to.depth;
      const bool exists = unit < L && d < D;
      static_cast<Element*>(p.to.projections)[i] =
          exists ? at(branch == 0 ? p.problem.v : p.problem.u, unit * D + d) : arch::from_float<Element>(0);
      return;
    }
    i -= count * p.to.depth;
    if (i < count) {
      const auto [branch, unit] = column_at(columns, static_cast<int>(i));
      const void* bias = branch == 0 ? p.problem.v_bias : p.problem.u_bias;
      p.to.biases[i] = bias != nullptr && unit < L ? arch::to_float(at(bias, unit)) : 0;
      return;
    }
    i -= count;
    if (i >= p.problem.K * units) return;
    const int64_t k = i / units, unit = i % units;
    p.to.heads[i] = unit < L ? arch::to_float(at(p.problem.w, k * L + unit)) : 0;
  }
};

}  // namespace

void pack(const Problem& p, const Packed& to, const arch::Stream& stream) {
  const int64_t columns = column_count(columns_of(p)), heads = int64_t{p.K} * padded_units(columns_of(p));
  with_element(p.type, [&](auto element) {
    using Kernel = Pack<decltype(element)>;
    const int64_t blocks = arch::divide_up<int64_t>(columns * (to.depth + 1) + heads, Kernel::kThreads);
    arch::launch<Kernel>({p, to}, {static_cast<int>(blocks)}, 0, stream);
  });
}

}  // namespace ercn::pool
