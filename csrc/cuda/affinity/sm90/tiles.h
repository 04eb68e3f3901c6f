#pragma once
// Tile sizes of the Hopper affinity kernels, and where everything lies in shared memory: pure functions of D and of P,
// the channels of value padded to 8, 24 or 32.
//
// Two consumer warpgroups compute and one thread of a third loads. Tiles of 16-bit elements are rows of 64 (128 bytes,
// in the tensor copy engine's 128-byte swizzle), so 64 features or 64 pixels wide:
//   features     [pixels, 64 of D]: a chunk; K-major for FᵀF, MN-major for F·W
//   terms        [2 P, 64 pixels]: the high terms of P channels, then the low ones; K-major for A·Vᵀ
//   pairs        [2 P, 64 pixels]: V' then G', or G' then V'; MN-major for W
#include <cstdint>

namespace ercn::sm90::affinity {

constexpr int kSharedLimit = 227 << 10;
constexpr int kConsumers = 2;
constexpr int kWarpgroup = 128;
constexpr int kBlockThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kRegistersConsumer = 240, kRegistersProducer = 24;

constexpr int kChunk = 64;                     // 16-bit elements in a row of a tile
constexpr int kRowBytes = 2 * kChunk;          // 128
constexpr int kStepRows = 16 * kRowBytes;      // from one wgmma step to the next where K runs over rows
constexpr int kStepColumns = 16 * 2;           // and where K runs along a row
constexpr int kBarrierBytes = 1024;
constexpr int kPixels = 128;                   // of a tile's side, if not said otherwise; terms are padded to it
constexpr int kMostStages = 8;

// Rows of a group in the forward: as many as leave shared memory for columns.
constexpr int forward_rows(int dim) { return dim <= 192 ? 2 * kPixels : kPixels; }
// Columns of a tile in the backward: 256 features' gradients leave registers for 64 products of a row.
constexpr int backward_columns(int dim) { return dim <= 192 ? kPixels : kPixels / 2; }

// Channels of one launch, padded to what the kernels are compiled for.
constexpr int kMostChannels = 32;
constexpr int padded_channels(int channels) { return channels <= 8 ? 8 : channels <= 24 ? 24 : 32; }

constexpr int64_t kMostImages = 65535 / 3;  // a side of a grid is three maps of every image

constexpr int stages(int fixed_bytes, int stage_bytes) {
  const int fit = (kSharedLimit - kBarrierBytes - fixed_bytes) / stage_bytes;
  return fit < kMostStages ? fit : kMostStages;
}

// Forward: groups of kRows rows, tiles of kPixels columns. A group's features stay, the columns' stream in chunks.
template <int D, int P>
struct ForwardTiles {
  static constexpr int kTerms = 2 * P;
  static constexpr int kChunks = D / kChunk;
  static constexpr int kRows = forward_rows(D);
  static constexpr int kRowTiles = kRows / kPixels;  // half of each is one warpgroup's
  static constexpr int kTermStages = 2;

  static constexpr int kChunkBytes = kPixels * kRowBytes;
  static constexpr int kTermBytes = kPixels / kChunk * kTerms * kRowBytes;  // of kPixels pixels
  static constexpr int kAffinityBytes = kPixels * kPixels * 2;              // A of one row tile, for its transposed use

  static constexpr int kFeatRows = 0;
  static constexpr int kTermRows = kFeatRows + kRowTiles * kChunks * kChunkBytes;
  static constexpr int kAffinity = kTermRows + kRowTiles * kTermBytes;
  static constexpr int kTermColumns = kAffinity + kAffinityBytes;
  static constexpr int kFeatColumns = kTermColumns + kTermStages * kTermBytes;
  static constexpr int kStages = stages(kFeatColumns, kChunkBytes);
  static constexpr int kBarriers = kFeatColumns + kStages * kChunkBytes;
  static constexpr int kShared = kBarriers + kBarrierBytes;
  static_assert(kStages >= 2 && kShared <= kSharedLimit);
};

// Backward: groups of kPixels rows, tiles of kColumns columns, which stream whole.
template <int D, int P>
struct BackwardTiles {
  static constexpr int kTerms = 2 * P;
  static constexpr int kChunks = D / kChunk;
  static constexpr int kRows = kPixels;
  static constexpr int kColumns = backward_columns(D);

  static constexpr int kRowChunkBytes = kRows * kRowBytes, kColumnChunkBytes = kColumns * kRowBytes;
  static constexpr int kMapBytes = kTerms * kRowBytes;  // terms or pairs of kChunk pixels
  static constexpr int kTermBytes = kColumns / kChunk * kMapBytes;

  static constexpr int kFeatRows = 0;
  static constexpr int kPairRows = kFeatRows + kChunks * kRowChunkBytes;
  static constexpr int kColumnStages = kPairRows + kRows / kChunk * kMapBytes;
  // within a stage
  static constexpr int kFeat = 0;
  static constexpr int kTerm = kFeat + kChunks * kColumnChunkBytes;
  static constexpr int kPair = kTerm + kTermBytes;
  static constexpr int kStageBytes = kPair + kTermBytes;
  static constexpr int kStages = stages(kColumnStages, kStageBytes);
  static constexpr int kBarriers = kColumnStages + kStages * kStageBytes;
  static constexpr int kShared = kBarriers + kBarrierBytes;
  static_assert(kStages >= 2 && kShared <= kSharedLimit);
};

}  // namespace ercn::sm90::affinity
