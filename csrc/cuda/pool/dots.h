#pragma once
#include <arch/launch.h>

#include "pool/problem.h"

namespace ercn::pool {

// q = ĝ·h, 0 where not real, and of every segment Parts::largest, Parts::sum and `weighted` Σ e·q.
struct Dots {
  const void* grad_pooled;  // ĝ, contiguous [B, K, D] of h's type
  const float* scores;
  float* products;          // q, in the layout of scores
  Parts parts;
  float* weighted;          // [slots, K]
};

template <typename Element>
void dots(const Problem& problem, const Dots& of, const arch::Stream& stream);

}  // namespace ercn::pool
