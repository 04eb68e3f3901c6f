#pragma once
#include <arch/launch.h>

#include "pool/packed.h"
#include "pool/problem.h"

namespace ercn::pool {

// The gradients of P = [V|U] h from the gradient ds of scores, of slots first_slot ≤ slot < last_slot:
//   dt = (wᵀ ds) ⊙ σ ⊙ (1 - t²),   dσ = (wᵀ ds) ⊙ t ⊙ σ (1 - σ)
// What is null is not wanted. Slots without a segment have sums of 0, and no branch_grads.
template <typename Element>
struct Branch {
  const float* score_grad;  // ds, in the layout of scores
  const float* scale;       // a power of two for branch_grads, and its inverse; or null for 1
  Element* branch_grads;    // [64 rows of each slot, column_count]; 0 in rows that are not real
  float* part_heads;        // Σ ds ⊗ (t ⊙ σ) [slots of the batch, K, L]
  float* part_biases;       // Σ dt, Σ dσ [slots of the batch, branches, L]
  int64_t first_slot, last_slot;
};

template <typename Precision>
void branch(
    const Problem& problem, const Packed<typename Precision::Element>& weights,
    const Branch<typename Precision::Element>& of, bool gated, const arch::Stream& stream);

}  // namespace ercn::pool
