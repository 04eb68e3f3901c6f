#pragma once
#include <arch/launch.h>

#include "pool/problem.h"

namespace ercn::pool {

// pooled [B, K, D] of `type` from the parts of every segment, each bag's slots in ascending order; 0 for a bag without
// real instances.
void combine(const Problem& problem, const Parts& parts, void* pooled, Type type, const arch::Stream& stream);

// Of every bag and head [B, K]: the largest score (0 if none is real), Σ e (1 if none), and Σ a·q, q = ĝ·h.
struct Statistics {
  float *largest, *sum, *mean;
};

// Likewise, from the parts of the backward: Parts::largest, Parts::sum and `weighted` Σ e·q [slots, K].
void combine_statistics(
    const Problem& problem, const Parts& parts, const float* weighted, const Statistics& bags,
    const arch::Stream& stream);

}  // namespace ercn::pool
