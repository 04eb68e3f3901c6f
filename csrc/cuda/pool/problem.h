#pragma once
// Gated attention pooling as its kernels see it:
//   s = w · (drop(act(V h + b_V)) ⊙ drop(σ(U h + b_U))) + b_w,   a = softmax(s),   z = Σ a h
#include <arch/base.h>

#include "pool/dropout.h"
#include "pool/segments.h"

namespace ercn::pool {

enum class Activation { kTanh, kRelu, kGelu };

// h [B, N, D] or [T, D]; strides in elements.
struct Instances {
  const void* data;
  int64_t stride_b, stride_n, stride_d;
  bool channels_first, vector;  // how the generic kernels read it
};

// [B, N]; a null mask has every instance real.
struct Mask {
  const bool* data;
  int64_t stride_b, stride_n;
};

// Contiguous: V and U [L, D], w [K, L], their biases [L], [L], [K]. All of them but V and w may be null.
struct Weights {
  const void *v, *v_bias, *u, *u_bias, *w, *w_bias;
};

struct Problem {
  Bags bags;
  int D, L, K;
  Float type;
  bool gated, exact;
  Activation activation;
  Dropout dropout;
  Instances h;
  Mask mask;
  Weights weights;
};

// The softmax of one segment, by slot and head [slots, K]: the largest score, and Σ e of e = exp(s - largest).
struct SegmentSoftmax {
  float *largest, *sum;
};

// Rows of ForwardParams::pooled begin at multiples of 16 bytes.
ERCN_HOST_DEVICE int64_t pooled_width(int64_t D) { return arch::round_up<int64_t>(D, 4); }

// The arguments of each architecture's kernels. A result whose pointer is null is not wanted; slots without a segment
// are not written.
struct ForwardParams {
  Problem problem;
  SegmentSoftmax softmax;
  float* pooled;       // Σ e·h [slots, K, pooled_width(D)]; where null, only scores are written
  float* scores;       // [B, K, N] or [K, T], -Inf where masked
  const float* given;  // scores in that layout, which are pooled by instead, or null (always on Hopper)
};

// q = ĝ·h, 0 where not real, and the statistics of each segment.
struct DotsParams {
  Problem problem;
  const void* grad_pooled;  // ĝ, contiguous [B, K, D] of h's type
  const float* scores;
  float* dots;              // q, in the layout of scores
  SegmentSoftmax softmax;
  float* weighted;          // Σ e·q [slots, K]
};

// The gradients dP of P = [V|U] h for a chunk of slots, first_slot ≤ slot < last_slot.
struct BranchGradients {
  void* data;          // of h's type [64 rows of each slot, columns]; 0 in rows that are not real
  const float* scale;  // a power of two that data holds dP times, and its inverse; or null for 1
  int64_t first_slot, last_slot;
};

// dP from the gradient ds of scores:
//   dt = (wᵀ ds) ⊙ σ ⊙ act'(v),   dσ = (wᵀ ds) ⊙ t ⊙ σ (1 - σ),   t = act(v)
struct BranchParams {
  Problem problem;
  BranchGradients dp;
  const float* score_grad;  // ds, in the layout of scores
  float* part_heads;        // Σ ds ⊗ (t ⊙ σ) [slots of the batch, K, L]
  float* part_biases;       // Σ dt, Σ dσ [slots of the batch, branches, L]
};

// grad_h = dP · [V; U] + aᵀ ĝ, 0 in rows that are not real.
struct RowGradientParams {
  Problem problem;
  BranchGradients dp;
  const uint32_t* real;     // [slots of the batch, 2]: which of a segment's 64 rows are real, a bit each
  const float* attention;   // a, in the layout of scores, or null
  const void* grad_pooled;  // ĝ, likewise
  void* grad_h;             // contiguous, in the shape of h
};

// parts [splits, units, D] (+)= dPᵀ h
struct WeightGradientParams {
  Problem problem;
  BranchGradients dp;
  const uint32_t* real;
  float* parts;
  WeightTiling tiling;
  bool accumulate;
};

// Whether row i of a segment exists and is not masked.
ERCN_DEVICE bool is_real(const Mask& mask, const Segment& segment, int i) {
  if (i >= segment.rows) return false;
  return mask.data == nullptr || mask.data[segment.bag * mask.stride_b + (segment.in_bag + i) * mask.stride_n];
}

}  // namespace ercn::pool
