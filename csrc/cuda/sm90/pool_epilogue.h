#pragma once
// Where a thread's accumulators of [V|U] h lie, and the small operands beside them.
#include <arch/convert.h>

#include "sm90/pool_product.h"

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

// A thread's place in its warpgroup's tile: rows row(0) and row(1), and in the j-th 8 columns column(j) and the next.
struct Place {
  int warp = arch::warp_index() % 4, lane = arch::lane_index();
  ERCN_DEVICE int row(int r) const { return 16 * warp + lane / 4 + 8 * r; }
  ERCN_DEVICE int column(int j) const { return 8 * j + lane % 4 * 2; }
};

// Of four registers in each of four lanes, lane i gets the i-th of every lane, in the order of lanes: the pairs of
// columns that a thread has of four 8-column blocks become the 16 bytes of one block.
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

using arch::swizzled;

// For barriers of one warpgroup that multiplies; 0 is the block's.
ERCN_DEVICE void sync_warpgroup(int own) { arch::named_barrier(1 + own, 128); }

}  // namespace ercn::sm90
