#pragma once
// Gated attention pooling as its kernels see it:
//   s = w · (drop(act(V h + b_V)) ⊙ drop(σ(U h + b_U))) + b_w,   a = softmax(s),   z = Σ a h
#include <arch/base.h>

#include "pool/dropout.h"
#include "pool/segments.h"

namespace ercn::pool {

enum class Activation { kTanh, kRelu, kGelu };

// Sizes, the instances h [B, N, D] or [T, D] (strides in elements), which of them are real (mask [B, N] or null), and
// the weights, contiguous: V and U [L, D], w [K, L]; biases [L], [L], [K]. All of them but V and w may be null.
struct Problem {
  Bags bags;
  int D, L, K;
  Float type;
  bool gated, exact;
  Activation activation;
  Dropout dropout;
  const void* h;
  int64_t h_b, h_n, h_d;
  bool channels_first, vector;  // how the generic kernels read h
  const bool* mask;
  int64_t mask_b, mask_n;
  const void *v, *v_bias, *u, *u_bias, *w, *w_bias;
};

// Partial results of the softmax over one segment, by slot and head: the largest score, Σ e and Σ e·h, e = exp(s -
// largest).
struct Parts {
  float *largest, *sum;  // [slots, K]
  float* pooled;         // [slots, K, pooled_width(D)]
};

// Rows of Parts::pooled begin at multiples of 16 bytes.
ERCN_HOST_DEVICE int64_t pooled_width(int64_t D) { return arch::round_up<int64_t>(D, 4); }

// What the kernels of either pool are given. Pointers that are null are not wanted; slots without a segment are left as
// they are.
struct ForwardParams {
  Problem problem;
  Parts parts;    // all of them or none: the scores alone
  float* scores;  // [B, K, N] or [K, T], -Inf where masked
  const float* given;  // scores in that layout, which are pooled by instead, or null (always on Hopper)
};

// q = ĝ·h, 0 where not real, and of every segment Parts::largest, Parts::sum and `weighted` Σ e·q.
struct ProductsParams {
  Problem problem;
  const void* grad_pooled;  // ĝ, contiguous [B, K, D] of h's type
  const float* scores;
  float* products;          // q, in the layout of scores
  Parts parts;
  float* weighted;          // [slots, K]
};

// The gradients dP of P = [V|U] h from the gradient ds of scores, of slots first_slot ≤ slot < last_slot:
//   dt = (wᵀ ds) ⊙ σ ⊙ act'(v),   dσ = (wᵀ ds) ⊙ t ⊙ σ (1 - σ),   t = act(v)
struct BranchParams {
  Problem problem;
  const float* score_grad;  // ds, in the layout of scores
  const float* scale;       // a power of two for branch_grads, and its inverse; or null for 1
  void* branch_grads;       // dP of h's type [64 rows of each slot, columns]; 0 in rows that are not real
  float* part_heads;        // Σ ds ⊗ (t ⊙ σ) [slots of the batch, K, L]
  float* part_biases;       // Σ dt, Σ dσ [slots of the batch, branches, L]
  int64_t first_slot, last_slot;
};

// grad_h = dP · [V; U] + aᵀ ĝ, 0 in rows that are not real.
struct RowsParams {
  Problem problem;
  const void* branch_grads;
  const float* scale;
  const uint32_t* real;     // [slots of the batch, 2]: which of a segment's 64 rows are real, a bit each
  const float* attention;   // a, in the layout of scores, or null
  const void* grad_pooled;  // ĝ, likewise
  void* grad_h;             // contiguous, in the shape of h
  int64_t first_slot, last_slot;
};

// parts [splits, units, D] (+)= dPᵀ h
struct WeightsParams {
  Problem problem;
  const void* branch_grads;
  const float* scale;
  const uint32_t* real;
  float* parts;
  WeightShares shares;
  bool accumulate;
  int64_t first_slot, last_slot;
};

// Whether row i of a segment exists and is not masked.
ERCN_DEVICE bool is_real(const Problem& p, const Segment& segment, int i) {
  if (i >= segment.rows) return false;
  return p.mask == nullptr || p.mask[segment.bag * p.mask_b + (segment.in_bag + i) * p.mask_n];
}

}  // namespace ercn::pool
