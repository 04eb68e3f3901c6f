#pragma once
// Sizes of the pool's tiles on Hopper, and the order in which a warpgroup meets the channels of its segment.
#include <arch/host_device.h>

#include "pool/segments.h"

namespace ercn::sm90 {

constexpr int kDepth = 64;          // channels of a slab: rows of 128 bytes, one swizzle pattern wide
constexpr int kWarpgroups = 2;      // that multiply, each one segment; they share the weights
constexpr int kUnits = 128;         // hidden units of a group: 128 columns of V beside 128 of U are one wgmma wide
constexpr int kRowSlabs = 8;        // slabs of h that a warpgroup holds: D ≤ 512 stays in shared memory
constexpr int kWeightStages = 3;    // slabs of [V|U] on their way
constexpr int kMaxHeads = 8;        // one wgmma wide
constexpr int kMaxSlabs = 48;       // D ≤ 3072: ĝ of two bags beside the slabs of h

constexpr int kSlabBytes = kSegmentRows * kDepth * 2;
constexpr int kWeightBytes = 2 * kUnits * kDepth * 2;

// The tile is met once for every group of hidden units, and once more for its pooled sum. Passes go up and down in
// turn, so that each begins with the kRowSlabs slabs that the one before left in shared memory; a slab's place never
// changes. The others are read again, from the L2 cache: no more than `slabs` lie between two uses of a slab.
ERCN_HOST_DEVICE constexpr int slab_at(int slabs, int pass, int i) { return pass % 2 == 0 ? i : slabs - 1 - i; }

// Whether the i-th slab of a pass has to be loaded for it.
ERCN_HOST_DEVICE constexpr bool is_loaded(int pass, int i) { return pass == 0 || i >= kRowSlabs; }

// Whether its place is given up after its use: another slab of this pass needs it, or the segment is done.
ERCN_HOST_DEVICE constexpr bool is_released(int slabs, int pass, int last_pass, int i) {
  return pass == last_pass || i < slabs - kRowSlabs;
}

// Outputs of a block of the backward's products: 64 rows for each warpgroup, and
constexpr int kGemmColumns = 256;

// Shares so that about every multiprocessor has a block.
ERCN_HOST_DEVICE constexpr WeightShares weight_shares(
    bool need_v, bool need_u, int L, int D, int64_t slots, int multiprocessors) {
  const int units = (need_v ? L : 0) + (need_u ? L : 0);
  const int blocks = arch::divide_up(units, kWarpgroups * kDepth) * arch::divide_up(D, kGemmColumns);
  const int64_t wanted = blocks == 0 ? 0 : blocks < multiprocessors ? multiprocessors / blocks : 1;
  return {need_v ? 0 : L, units, blocks, static_cast<int>(wanted < slots ? wanted : slots)};
}

}  // namespace ercn::sm90
