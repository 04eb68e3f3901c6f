#pragma once
// The launchers of the generic kernels, and the weights as they read them: padded with zeros, so that no product has an
// edge there.
#include <arch/launch.h>

#include "pool/generic/tiles.h"
#include "pool/problem.h"

namespace ercn::pool {

struct Packed {
  void* projections;  // [column_count, depth] of h's type, in the order of columns
  float* biases;      // [column_count]
  float* heads;       // w, [K, padded_units]
  int depth;          // D, padded to a multiple of 32
};

template <typename Base>
struct PackedParams : Base {
  Packed packed;
};

ERCN_HOST_DEVICE Columns columns_of(const Problem& p) { return {p.L, p.gated}; }

void forward(const PackedParams<ForwardParams>& p, const arch::Stream& stream);
void dots(const DotsParams& p, const arch::Stream& stream);
void branch(const PackedParams<BranchParams>& p, const arch::Stream& stream);
void row_gradient(const PackedParams<RowGradientParams>& p, const arch::Stream& stream);
void weight_gradient(const WeightGradientParams& p, const arch::Stream& stream);

// Starts Kernel<Precision, CHANNELS_FIRST> as the problem has it.
template <template <typename, bool> class Kernel, typename Params>
void launch(const Params& p, arch::Grid grid, const arch::Stream& stream) {
  const auto start = [&](auto kernel) {
    using Chosen = decltype(kernel);
    arch::launch<Chosen>(p, grid, sizeof(typename Chosen::Shared), stream);
  };
  with_precision(p.problem.type, p.problem.exact, [&](auto precision) {
    using Precision = decltype(precision);
    p.problem.h.channels_first ? start(Kernel<Precision, true>()) : start(Kernel<Precision, false>());
  });
}

}  // namespace ercn::pool
