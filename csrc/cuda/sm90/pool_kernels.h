#pragma once
// The pool's kernels on Hopper and what they are given.
#include <arch/launch.h>

#include "library.h"
#include "sm90/pool_product.h"

namespace ercn::sm90 {

struct ForwardParams {
  pool::Problem problem;
  pool::Weights weights;
  pool::Parts parts;
  float* scores;  // [B, K, N] or [K, T]
  ProductMaps maps;
};

// Slots first_slot ≤ slot < last_slot. What is null is not wanted.
struct BranchParams {
  pool::Problem problem;
  pool::Weights weights;
  const float* score_grad;  // ds, in the layout of scores
  void* branch_grads;       // dP [64 rows of each slot, dt of L | dσ of L], of h's type, times *scale; 0 in rows that are not real
  const float* scale;       // a power of two that keeps fp16 in its range, or null for 1
  float* part_heads;        // Σ ds ⊗ (t ⊙ σ) [slots of the batch, K, L]
  float* part_bias;         // Σ dt, Σ dσ [slots of the batch, 2, L]
  int64_t first_slot, last_slot;
  ProductMaps maps;
};

void pool_forward(const ForwardParams& params, ScalarType type, bool channels_first, const arch::Stream& stream);

void pool_branch(const BranchParams& params, ScalarType type, bool channels_first, const arch::Stream& stream);

}  // namespace ercn::sm90
