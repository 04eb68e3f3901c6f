#pragma once
#include <arch/launch.h>

#include "pool/packed.h"
#include "pool/problem.h"

namespace ercn::pool {

// Scores, -Inf where masked, and the parts of every segment.
struct Forward {
  Parts parts;
  float* scores;        // [B, K, N] or [K, T]
  const void* w_bias;   // [K] of h's type, or null
};

template <typename Precision>
void forward(
    const Problem& problem, const Packed<typename Precision::Element>& weights, const Forward& to, bool gated,
    const arch::Stream& stream);

}  // namespace ercn::pool
