#pragma once
// Sizes of the pool's tiles on Hopper, and the order in which a warpgroup meets the channels of its segment.
#include <arch/host_device.h>

#include "segments.h"

namespace ercn::sm90 {

constexpr int kDepth = 64;          // channels of a slab: rows of 128 bytes, one swizzle pattern wide
constexpr int kWarpgroups = 2;      // that multiply, each one segment; they share the weights
constexpr int kUnits = 128;         // hidden units of a group: 128 columns of V beside 128 of U are one wgmma wide
constexpr int kRowSlabs = 8;        // slabs of h that a warpgroup holds: D ≤ 512 stays in shared memory
constexpr int kWeightStages = 3;    // slabs of [V|U] on their way
constexpr int kMaxHeads = 8;        // one wgmma wide

constexpr int kSlabBytes = kSegmentRows * kDepth * 2;
constexpr int kWeightBytes = 2 * kUnits * kDepth * 2;

// The tile is met once for every group of hidden units, and once more for its pooled sum. Passes go up and down in turn, so
// that each begins with the kRowSlabs slabs that the one before left in shared memory; a slab's place never changes. The
// others are read again, from the L2 cache: no more than `slabs` lie between two uses of a slab.
ERCN_HOST_DEVICE constexpr int slab_at(int slabs, int pass, int i) { return pass % 2 == 0 ? i : slabs - 1 - i; }

// Whether the i-th slab of a pass has to be loaded for it.
ERCN_HOST_DEVICE constexpr bool is_loaded(int pass, int i) { return pass == 0 || i >= kRowSlabs; }

// Whether its place is given up after its use: another slab of this pass needs it, or the segment is done.
ERCN_HOST_DEVICE constexpr bool is_released(int slabs, int pass, int last_pass, int i) {
  return pass == last_pass || i < slabs - kRowSlabs;
}

}  // namespace ercn::sm90
