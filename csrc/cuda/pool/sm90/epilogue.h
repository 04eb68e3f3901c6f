#pragma once
// What the epilogues share: where the accumulators of a thread lie, and the small operands beside them.
#include <arch/convert.h>

#include <cmath>

#include "pool/sm90/mainloop.h"

namespace ercn::sm90 {

struct Pair {
  float x[2];
};

// Elements i and i + 1 of a vector, i even; zeros for no vector.
template <typename Element>
ERCN_DEVICE Pair load_pair(const void* vector, int64_t i) {
  if (vector == nullptr) return {};
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(static_cast<const Element*>(vector) + i);
  return {{arch::unpack_low<Element>(pair), arch::unpack_high<Element>(pair)}};
}

// A thread's part of its warpgroup's accumulators: rows row(0) and row(1), and of the j-th 8 columns column(j) and the
// next.
struct Fragment {
  int warp = arch::warp_index() % 4, lane = arch::lane_index();
  ERCN_DEVICE int row(int r) const { return 16 * warp + lane / 4 + 8 * r; }
  ERCN_DEVICE int column(int j) const { return 8 * j + lane % 4 * 2; }
};

// Transposes four registers of four lanes: lane i gets register i of each. A thread's pairs of columns in four 8-column
// blocks become the 16 bytes of one block.
ERCN_DEVICE void transpose_quad(uint32_t (&x)[4], int lane) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & mask) continue;
      const bool upper = lane & mask;
      const uint32_t got = arch::shuffle_xor(upper ? x[i] : x[i + mask], mask);
      x[i] = upper ? got : x[i];
      x[i + mask] = upper ? x[i + mask] : got;
    }
  }
}

// Dropout of a group's units from `first` on, for the segment's instances: dropped units get a gate of σ(-Inf) = 0. A
// thread has all the units of a draw.
ERCN_DEVICE void drop(
    const pool::Problem& p, const Segment& segment, int first, const Fragment& fragment, float (&sums)[kSums]) {
  const uint64_t seed = static_cast<uint64_t>(*p.dropout.seed);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (first + 64 * half >= p.L) break;
#pragma unroll
    for (int j = 8 * half; j < 8 * half + 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint64_t instance = static_cast<uint64_t>(segment.first + fragment.row(i / 2));
        const pool::Words words =
            pool::random_words(seed, instance, pool::counter_of(first + fragment.column(j) + i % 2));
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          float& sum = sums[kGate + 4 * (j + 2 * word) + i];
          if (pool::is_dropped<true>(words.at[word], p.dropout.limit)) sum = -INFINITY;
        }
      }
    }
  }
}

using arch::swizzled;

// A barrier of one consumer warpgroup; 0 is the block's.
ERCN_DEVICE void sync_warpgroup(int consumer) { arch::named_barrier(1 + consumer, 128); }

}  // namespace ercn::sm90
