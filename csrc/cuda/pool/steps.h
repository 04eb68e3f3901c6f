#pragma once
// Steps that either pool takes between its products.
#include <arch/launch.h>

#include "pool/problem.h"

namespace ercn::pool {

// pooled [B, K, D] of h's type from the parts of every segment, each bag's slots in ascending order; 0 for a bag
// without real instances.
struct CombineParams {
  Problem problem;
  Parts parts;
  void* pooled;
};
void combine(const CombineParams& p, const arch::Stream& stream);

// Of every bag and head [B, K]: the largest score (0 if none is real), Σ e (1 if none), and Σ a·q, q = ĝ·h.
struct Statistics {
  float *largest, *sum, *mean;
};

// Likewise, from the parts of the backward: Parts::largest, Parts::sum and `weighted` Σ e·q [slots, K].
struct StatisticsParams {
  Problem problem;
  Parts parts;
  const float* weighted;
  Statistics bags;
};
void combine_statistics(const StatisticsParams& p, const arch::Stream& stream);

// The gradient of scores, and the attention, in the layout of scores; a masked instance has 0. Slots without a segment
// have sums of 0 and no real row.
struct ScoreGradientParams {
  Problem problem;
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
void score_gradient(const ScoreGradientParams& p, const arch::Stream& stream);

// scale [2]: a power of two that brings dP, the gradients of the branches, into fp16's range, and its inverse; from the
// largest |ds| of every slot, and w.
struct BranchScaleParams {
  Problem problem;
  const float* largest;
  float* scale;
};
void branch_scale(const BranchScaleParams& p, const arch::Stream& stream);

// to [columns] of `type` from its partial results: Σ parts[row, column] over `rows` rows `stride` floats apart, in a
// fixed order.
struct ColumnSumsParams {
  const float* parts;
  int64_t rows, stride, columns;
  void* to;
  Float type;
};
void column_sums(const ColumnSumsParams& p, const arch::Stream& stream);

}  // namespace ercn::pool
