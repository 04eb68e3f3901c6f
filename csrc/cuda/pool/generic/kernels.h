#pragma once
// The generic kernels, and the weights as they read them: padded with zeros, so that no product has an edge there.
#include <arch/launch.h>

#include "pool/generic/columns.h"
#include "pool/problem.h"

namespace ercn::pool {

constexpr int kGradientColumns = 64, kGradientChannels = 128;  // of dP and of h, in a block of a product with dP

struct Packed {
  void* projections;  // [column_count, depth] of h's type, in the order of columns
  float* biases;      // [column_count]
  float* heads;       // w, [K, padded_units]
  int depth;          // D, a multiple of 32
};

template <typename Base>
struct PackedParams : Base {
  Packed packed;
};

ERCN_HOST_DEVICE Columns columns_of(const Problem& p) { return {p.L, p.gated}; }

void pack(const Problem& problem, const Packed& to, const arch::Stream& stream);
void forward(const PackedParams<ForwardParams>& p, const arch::Stream& stream);
void dots(const ProductsParams& p, const arch::Stream& stream);
void branch(const PackedParams<BranchParams>& p, const arch::Stream& stream);
void row_gradient(const PackedParams<RowsParams>& p, const arch::Stream& stream);
void weight_gradient(const WeightsParams& p, const arch::Stream& stream);

}  // namespace ercn::pool
