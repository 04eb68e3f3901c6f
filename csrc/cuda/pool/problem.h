#pragma once
// Gated attention pooling as its kernels see it:  s = w · (tanh(V h + b_V) ⊙ σ(U h + b_U)) + b_w,  a = softmax(s),  z =
// Σ a h
#include <arch/base.h>

#include "segments.h"

namespace ercn::pool {

enum class Type { kFloat, kBf16, kFp16 };

// Sizes, the instances h [B, N, D] or [T, D] (strides in elements) and which of them are real (mask [B, N] or null).
struct Problem {
  Bags bags;
  int D, L, K;
  const void* h;
  int64_t h_b, h_n, h_d;
  const bool* mask;
  int64_t mask_b, mask_n;
};

// Weights, contiguous and of h's type: V and U [L, D], w [K, L]; biases [L], [L], [K]. All but V and w may be null.
struct Weights {
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

// Whether row i of a segment exists and is not masked.
ERCN_DEVICE bool is_real(const Problem& p, const Segment& segment, int i) {
  if (i >= segment.rows) return false;
  return p.mask == nullptr || p.mask[segment.bag * p.mask_b + (segment.in_bag + i) * p.mask_n];
}

}  // namespace ercn::pool
