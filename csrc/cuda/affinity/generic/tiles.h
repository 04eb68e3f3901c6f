#pragma once
// Tile sizes of the generic affinity kernels, what they need of shared memory, and how work is cut: pure functions.
//
// Everything in shared memory is rows of 128 bytes (kRowBytes), in 16-byte granules whose order is permuted within a
// row so that no access meets a bank twice. A chunk is the features of one row: 64 of 16 bits or 32 of fp32.
#include <arch/host_device.h>

#include <cstdint>

namespace ercn::affinity {

constexpr int kRowBytes = 128;
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kChannels = 32;      // channels of value that a block takes
constexpr int kPixelMultiple = 128;  // the packed operands are padded to it

// Forward: a block owns kForwardRows rows, and meets kForwardColumns columns a step; features come a chunk at a time.
constexpr int kForwardRows = 128, kForwardColumns = 64, kForwardStages = 3;
constexpr int kRowChunkBytes = kForwardRows * kRowBytes, kColumnChunkBytes = kForwardColumns * kRowBytes;
constexpr int kTermTileBytes = 2 * kChannels * kRowBytes;  // two bf16 terms of 64 columns, or fp32

// Backward: kBackwardRows rows whose gradients stay in registers, kBackwardColumns columns a step, two steps in memory.
constexpr int kBackwardRows = 64, kBackwardColumns = 32, kBackwardStages = 2;
constexpr int kPairRowBytes = 2 * kChannels * kBackwardRows * 4;        // value and gradient of the rows, fp32
constexpr int kPairColumnBytes = 2 * kChannels * kBackwardColumns * 4;  // and of the columns

ERCN_HOST_DEVICE constexpr int chunk_channels(int element_bytes) { return kRowBytes / element_bytes; }
ERCN_HOST_DEVICE constexpr int chunks_of(int64_t dim, int element_bytes) {
  return static_cast<int>(arch::divide_up<int64_t>(dim, chunk_channels(element_bytes)));
}

// Forward, from a shared memory limit: whether the features of the rows stay there, or come again with every step.
struct ForwardShared {
  bool resident;
  int term_tiles;  // a tile of value is read at the end of its columns' chunks, and kForwardStages chunks are under way
  int bytes;
};

ERCN_HOST_DEVICE constexpr ForwardShared forward_shared(int chunks, int limit) {
  const int term_tiles = arch::divide_up(kForwardStages - 1, chunks) + 1;
  const int streamed = kForwardStages * kColumnChunkBytes + term_tiles * kTermTileBytes;
  const int resident = streamed + chunks * kRowChunkBytes;
  if (resident <= limit) return {true, term_tiles, resident};
  return {false, term_tiles, streamed + kForwardStages * kRowChunkBytes};
}

ERCN_HOST_DEVICE constexpr int backward_shared(int chunks) {
  const int rows = kBackwardRows * kRowBytes, columns = kBackwardColumns * kRowBytes;
  return chunks * rows + kPairRowBytes + kBackwardStages * (chunks * columns + kPairColumnBytes);
}

// The most chunks that the backward takes on a device with this limit.
ERCN_HOST_DEVICE constexpr int backward_chunks(int limit) {
  int chunks = 0;
  while (backward_shared(chunks + 1) <= limit) ++chunks;
  return chunks;
}

// Cuts tiles of columns in slabs, so that `blocks` blocks of work become about `wanted`; the last slab may be shorter.
struct Slabs {
  int count, tiles;
};

ERCN_HOST_DEVICE constexpr Slabs slabs(int64_t tiles, int64_t blocks, int64_t wanted) {
  int64_t count = blocks >= wanted ? 1 : arch::divide_up(wanted, blocks);
  count = count < tiles ? count : tiles;
  const int64_t size = arch::divide_up(tiles, count);
  return {static_cast<int>(arch::divide_up(tiles, size)), static_cast<int>(size)};
}

}  // namespace ercn::affinity
