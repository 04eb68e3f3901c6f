#pragma once
// The pool's kernels on Hopper and what they are given.
#include <arch/launch.h>

#include "sm90/pool_product.h"

namespace ercn::sm90 {

struct ForwardParams {
  pool::Problem problem;
  pool::Weights weights;
  pool::Parts parts;
  float* scores;  // [B, K, N] or [K, T]
  ProductMaps maps;
};

// q = ĝ·h in the layout of scores; parts.largest, parts.sum and weighted Σ e·q [slots, K].
struct ProductsParams {
  pool::Problem problem;
  const void* grad_pooled;  // ĝ [B, K, D] of h's type
  const float* scores;
  float* products;
  pool::Parts parts;
  float* weighted;
  arch::TensorMap h;
};

// Slots first_slot ≤ slot < last_slot. What is null is not wanted.
struct BranchParams {
  pool::Problem problem;
  pool::Weights weights;
  const float* score_grad;  // ds, in the layout of scores
  // dP [64 rows of each slot, dt of L | dσ of L], of h's type, times *scale; 0 in rows that are not real.
  void* branch_grads;
  const float* scale;       // a power of two that keeps fp16 in its range, and its inverse; or null for 1
  float* part_heads;        // Σ ds ⊗ (t ⊙ σ) [slots of the batch, K, L]
  float* part_bias;         // Σ dt, Σ dσ [slots of the batch, 2, L]
  int64_t first_slot, last_slot;
  ProductMaps maps;
};

// Likewise; branch_grads is the map [rows, 2 L] of that dP in boxes of 64 rows × 64 units.
struct RowsParams {
  pool::Problem problem;
  const float* attention;   // a, in the layout of scores, or null
  const void* grad_pooled;  // ĝ [B, K, D] of h's type
  const float* scale;
  void* grad_h;             // contiguous, of h's type
  int64_t first_slot, last_slot;
  arch::TensorMap branch_grads, v, u;  // V and U [L, D] in boxes of 64 units × 64 channels
};

// parts [splits, units, D] (+)= dPᵀ h for columns first_unit … of dP.
struct WeightsParams {
  pool::Problem problem;
  const uint32_t* real;  // [slots of the batch, 2]
  const float* scale;
  float* parts;
  WeightShares shares;
  bool accumulate;
  int64_t first_slot, last_slot;
  arch::TensorMap branch_grads, h;
};

void pool_forward(const ForwardParams& params, pool::Type type, bool channels_first, const arch::Stream& stream);

void pool_products(const ProductsParams& params, pool::Type type, bool channels_first, const arch::Stream& stream);
void pool_branch(const BranchParams& params, pool::Type type, bool channels_first, const arch::Stream& stream);
void pool_rows(const RowsParams& params, pool::Type type, const arch::Stream& stream);
void pool_weights(const WeightsParams& params, pool::Type type, bool channels_first, const arch::Stream& stream);

}  // namespace ercn::sm90
