#pragma once
#include <arch/launch.h>

#include "pool/combine.h"
#include "pool/problem.h"

namespace ercn::pool {

// The gradient of scores, and the attention, in the layout of scores.
struct ScoreGradient {
  const float* scores;
  const float* grad_scores;  // of any strides, or null
  int64_t grad_b, grad_k, grad_n;
  Statistics bags;           // null where pooled has no gradient
  float* attention;          // a, likewise
  float* grad;               // holds q = ĝ·h, likewise, and becomes ds = a (q - Σ a q) + grad_scores
  float* parts;              // Σ ds over each segment, [slots, K]
  float* largest;            // max |ds| over each segment and all heads, [slots], or null
  uint32_t* real;            // [slots, 2]: which of a segment's 64 rows are real, a bit each
};

// a, ds and its sums; a masked instance has 0. Slots without a segment have sums of 0 and no real row.
void score_gradient(const Problem& problem, const ScoreGradient& of, const arch::Stream& stream);

}  // namespace ercn::pool
