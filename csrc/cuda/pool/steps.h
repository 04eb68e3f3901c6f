#pragma once
// The steps between the products, the same on every architecture.
#include <arch/launch.h>

#include "pool/problem.h"

namespace ercn::pool {

// pooled [B, K, D] of h's type from the partial results of the forward, each bag's slots in ascending order; 0 for a
// bag without real instances.
struct CombineParams {
  Bags bags;
  int D, K;
  Float type;
  SegmentSoftmax softmax;
  const float* sums;  // ForwardParams::pooled
  void* pooled;
};
void combine(const CombineParams& p, const arch::Stream& stream);

// Of every bag and head [B, K]: the largest score (0 if none is real), Σ e (1 if none), and Σ a·q, q = ĝ·h.
struct Statistics {
  float *largest, *sum, *mean;
};

// Likewise, from the partial results of DotsParams.
struct StatisticsParams {
  Bags bags;
  int K;
  SegmentSoftmax softmax;
  const float* weighted;
  Statistics to;
};
void combine_statistics(const StatisticsParams& p, const arch::Stream& stream);

// to [columns] of `type`: Σ parts[row, column] over `rows` rows `stride` floats apart, in a fixed order.
struct ColumnSumsParams {
  const float* parts;
  int64_t rows, stride, columns;
  void* to;
  Float type;
};
void column_sums(const ColumnSumsParams& p, const arch::Stream& stream);

// The gradient of the output scores, of any strides, or null.
struct GradScores {
  const float* data;
  int64_t stride_b, stride_k, stride_n;
};

// The gradient of scores, and the attention, in the layout of scores; a masked instance has 0. Slots without a segment
// have sums of 0 and no real row.
struct ScoreGradientParams {
  Bags bags;
  int K;
  Mask mask;
  const float* scores;
  GradScores grad_scores;
  Statistics statistics;  // null where pooled has no gradient
  float* attention;       // a, likewise
  float* grad;            // holds q = ĝ·h, likewise, and becomes ds = a (q - Σ a q) + grad_scores
  float* parts;           // Σ ds over each segment, [slots, K]
  float* largest;         // max |ds| over each segment and all heads, [slots], or null
  uint32_t* real;         // [slots, 2]: which of a segment's 64 rows are real, a bit each
};
void score_gradient(const ScoreGradientParams& p, const arch::Stream& stream);

// scale [2]: a power of two that brings dP into fp16's range, and its inverse.
struct BranchScaleParams {
  int64_t slots;
  int K, L;
  Activation activation;
  float dropout_scale;
  const void* w;         // [K, L] in fp16
  const float* largest;  // max |ds| of every slot
  float* scale;
};
void branch_scale(const BranchScaleParams& p, const arch::Stream& stream);

}  // namespace ercn::pool
