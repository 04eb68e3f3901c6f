#pragma once
// Tile sizes of the pool on Hopper, and the order in which a consumer takes the channels of its segment.
#include <arch/host_device.h>

#include "pool/segments.h"

namespace ercn::sm90 {

constexpr int kDepth = 64;          // channels of a slab: rows of 128 bytes, one swizzle pattern wide
constexpr int kConsumers = 2;       // warpgroups, each with one segment; they share the weights
constexpr int kUnits = 128;         // hidden units of a group: 128 columns of V beside 128 of U are one wgmma wide
constexpr int kRowSlabs = 8;        // slabs of h that a consumer holds: D ≤ 512 stays in shared memory
constexpr int kWeightStages = 3;    // of slabs of [V|U]
constexpr int kMaxHeads = 8;        // one wgmma wide
constexpr int kMaxSlabs = 48;       // D ≤ 3072: ĝ of two bags beside the slabs of h

constexpr int kSlabBytes = kSegmentRows * kDepth * 2;
constexpr int kWeightBytes = 2 * kUnits * kDepth * 2;

// A pass goes over the segment's slabs: one for every group of hidden units, and one for the pooled sum. Passes go up
// and down in turn, so that each begins with the kRowSlabs slabs that the last one left in shared memory; a slab's
// stage never changes. The others come again from the L2 cache: a slab's next use is at most `slabs` loads later.
ERCN_HOST_DEVICE constexpr int slab_at(int slabs, int pass, int i) { return pass % 2 == 0 ? i : slabs - 1 - i; }

// Whether the i-th slab of a pass has to be loaded for it.
ERCN_HOST_DEVICE constexpr bool is_loaded(int pass, int i) { return pass == 0 || i >= kRowSlabs; }

// Whether its stage is released after its use: another slab of this pass needs it, or the segment is done.
ERCN_HOST_DEVICE constexpr bool is_released(int slabs, int pass, int last_pass, int i) {
  return pass == last_pass || i < slabs - kRowSlabs;
}

constexpr int kGemmColumns = 256;  // of outputs of a block in products with dP, beside 64 rows for each consumer

// Splits so that about every multiprocessor has a block.
ERCN_HOST_DEVICE constexpr WeightTiling weight_tiling(
    bool need_v, bool need_u, int L, int D, int64_t slots, int multiprocessors) {
  const int units = (need_v ? L : 0) + (need_u ? L : 0);
  const int tiles = arch::divide_up(units, kConsumers * kDepth) * arch::divide_up(D, kGemmColumns);
  const int64_t wanted = tiles == 0 ? 0 : tiles < multiprocessors ? multiprocessors / tiles : 1;
  return {need_v ? 0 : L, units, tiles, static_cast<int>(wanted < slots ? wanted : slots)};
}

}  // namespace ercn::sm90
