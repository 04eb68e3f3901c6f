#pragma once
// The gradients that are products with dP, from slots first_slot ≤ slot < last_slot of branch.h's workspace.
#include <arch/launch.h>

#include "pool/packed.h"
#include "pool/problem.h"

namespace ercn::pool {

// grad_h = dP · [V; U] + aᵀ ĝ, 0 in rows that are not real.
template <typename Element>
struct RowGradient {
  const Element* branch_grads;
  const float* scale;          // branch_grads is times scale[0], scale[1] is its inverse; or null for 1
  const uint32_t* real;        // [slots of the batch, 2]: bits of real rows
  const float* attention;      // a, in the layout of scores, or null
  const Element* grad_pooled;  // ĝ, contiguous [B, K, D]
  Element* grad_h;             // contiguous, in the shape of h
  int64_t first_slot, last_slot;
};

template <typename Precision>
void row_gradient(
    const Problem& problem, const Packed<typename Precision::Element>& weights,
    const RowGradient<typename Precision::Element>& of, bool gated, const arch::Stream& stream);

// parts [splits, branches, L, D] (+)= dPᵀ · h; each split takes a share of the slots.
template <typename Element>
struct WeightGradient {
  const Element* branch_grads;
  const float* scale;
  const uint32_t* real;
  float* parts;
  int splits;
  bool accumulate;
  int64_t first_slot, last_slot;
};

template <typename Precision>
void weight_gradient(
    const Problem& problem, const WeightGradient<typename Precision::Element>& of, bool gated,
    const arch::Stream& stream);

// Blocks of one split.
ERCN_HOST_DEVICE constexpr int weight_gradient_blocks(int D, const Columns& columns) {
  return column_count(columns) / 64 * arch::divide_up(D, kColumns);
}

}  // namespace ercn::pool
