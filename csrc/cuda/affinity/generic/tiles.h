#pragma once
// Tile sizes, shared memory and splits of the generic affinity kernels, as pure functions.
//
// Tiles in shared memory are swizzled rows of 128 bytes (kRowBytes). A slab is the features of a row: 64 of 16 bits, or
// 32 of fp32.
#include <arch/host_device.h>

#include <cstdint>

namespace ercn::affinity {

constexpr int kRowBytes = 128;
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kBlockC = 32;          // channels of value of a block
constexpr int kPixelMultiple = 128;  // the packed operands are padded to it

// Forward: a block owns kForwardBlockM rows; a step of its mainloop takes one slab of kForwardBlockN columns.
constexpr int kForwardBlockM = 128, kForwardBlockN = 64, kForwardStages = 3;
constexpr int kRowSlabBytes = kForwardBlockM * kRowBytes, kColumnSlabBytes = kForwardBlockN * kRowBytes;
constexpr int kTermTileBytes = 2 * kBlockC * kRowBytes;  // two bf16 terms of 64 columns, or fp32

// Backward: a block owns kBackwardBlockM rows, their gradients in registers; a stage is all slabs of kBackwardBlockN
// columns.
constexpr int kBackwardBlockM = 64, kBackwardBlockN = 32, kBackwardStages = 2;
constexpr int kPairRowBytes = 2 * kBlockC * kBackwardBlockM * 4;     // value and gradient of the rows, fp32
constexpr int kPairColumnBytes = 2 * kBlockC * kBackwardBlockN * 4;  // and of the columns

ERCN_HOST_DEVICE constexpr int slab_channels(int element_bytes) { return kRowBytes / element_bytes; }
ERCN_HOST_DEVICE constexpr int slabs_of(int64_t dim, int element_bytes) {
  return static_cast<int>(arch::divide_up<int64_t>(dim, slab_channels(element_bytes)));
}

// The forward's shared memory within a limit.
struct ForwardShared {
  bool resident;   // the rows' features stay; else they come again with every step
  int term_tiles;  // tiles of value: each is read after its columns' last slab, with kForwardStages - 1 slabs in flight
  int bytes;
};

ERCN_HOST_DEVICE constexpr ForwardShared forward_shared(int slabs, int limit) {
  const int term_tiles = arch::divide_up(kForwardStages - 1, slabs) + 1;
  const int streamed = kForwardStages * kColumnSlabBytes + term_tiles * kTermTileBytes;
  const int resident = streamed + slabs * kRowSlabBytes;
  if (resident <= limit) return {true, term_tiles, resident};
  return {false, term_tiles, streamed + kForwardStages * kRowSlabBytes};
}

ERCN_HOST_DEVICE constexpr int backward_shared(int slabs) {
  const int rows = kBackwardBlockM * kRowBytes, columns = kBackwardBlockN * kRowBytes;
  return slabs * rows + kPairRowBytes + kBackwardStages * (slabs * columns + kPairColumnBytes);
}

// The most slabs of the backward within a limit of shared memory.
ERCN_HOST_DEVICE constexpr int most_backward_slabs(int limit) {
  int slabs = 0;
  while (backward_shared(slabs + 1) <= limit) ++slabs;
  return slabs;
}

// Splits of the sum over columns, `tiles` tiles each; the last may be shorter. `blocks` blocks become about `wanted`.
struct Splits {
  int count, tiles;
};

ERCN_HOST_DEVICE constexpr Splits split_columns(int64_t tiles, int64_t blocks, int64_t wanted) {
  int64_t count = blocks >= wanted ? 1 : arch::divide_up(wanted, blocks);
  count = count < tiles ? count : tiles;
  const int64_t size = arch::divide_up(tiles, count);
  return {static_cast<int>(arch::divide_up(tiles, size)), static_cast<int>(size)};
}

}  // namespace ercn::affinity
