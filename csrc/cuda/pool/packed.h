#pragma once
// The weights as the generic kernels read them: padded with zeros, so that no product has an edge there.
#include <arch/launch.h>

#include "pool/columns.h"
#include "pool/problem.h"

namespace ercn::pool {

template <typename Element>
struct Packed {
  Element* projections;  // [column_count, depth], in the order of columns
  float* biases;         // [column_count]
  float* heads;          // w, [K, padded_units]
  int depth;             // D, a multiple of 32
};

ERCN_HOST_DEVICE constexpr int packed_depth(int D) { return arch::round_up(D, 32); }

template <typename Element>
void pack(const Problem& problem, const Weights& weights, const Packed<Element>& to, const arch::Stream& stream);

}  // namespace ercn::pool
