#pragma once
// Tile sizes and shared-memory layout of the Hopper affinity kernels, as pure functions of D and of P, the channels of
// value padded to 8, 24 or 32.
//
// A block has two consumer warpgroups and one producer thread. Tiles are rows of 64 elements of 16 bits (128 bytes, in
// TMA's 128-byte swizzle), which are features or pixels:
//   features     [pixels, 64 of D]: a slab; K-major for FᵀF, MN-major for F·W
//   terms        [2 P, 64 pixels]: the high terms of P channels, then the low ones; K-major for A·Vᵀ
//   pairs        [2 P, 64 pixels]: V' then G', or G' then V'; MN-major for W
#include <cstdint>

namespace ercn::sm90::affinity {

constexpr int kSharedLimit = 227 << 10;
constexpr int kConsumers = 2;
constexpr int kWarpgroup = 128;
constexpr int kBlockThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kRegistersConsumer = 240, kRegistersProducer = 24;

constexpr int kSlab = 64;                  // elements in a row of a tile
constexpr int kRowBytes = 2 * kSlab;       // 128
constexpr int kStepRows = 16 * kRowBytes;  // between two wgmmas, 16 deep, where K runs over rows
constexpr int kStepColumns = 16 * 2;       // and where K runs along a row
constexpr int kBarrierBytes = 1024;
constexpr int kTileSide = 128;             // pixels, unless said otherwise; terms are padded to it
constexpr int kMostStages = 8;

// Rows of a row block in the forward: more leave no shared memory for columns.
constexpr int forward_rows(int dim) { return dim <= 192 ? 2 * kTileSide : kTileSide; }
// Columns of a tile in the backward: the gradients of 256 features leave registers for 64 columns.
constexpr int backward_columns(int dim) { return dim <= 192 ? kTileSide : kTileSide / 2; }

// Channels of one launch, padded to a compiled size.
constexpr int kMostChannels = 32;
constexpr int padded_channels(int channels) { return channels <= 8 ? 8 : channels <= 24 ? 24 : 32; }

constexpr int64_t kMostImages = 65535 / 3;  // the grid of WriteTerms has three maps of every image

constexpr int stages(int fixed_bytes, int stage_bytes) {
  const int fit = (kSharedLimit - kBarrierBytes - fixed_bytes) / stage_bytes;
  return fit < kMostStages ? fit : kMostStages;
}

// Forward: row blocks of kBlockM rows, whose features stay; tiles of kTileSide columns, whose features stream by slabs.
template <int D, int P>
struct ForwardTiles {
  static constexpr int kTerms = 2 * P;
  static constexpr int kSlabs = D / kSlab;
  static constexpr int kBlockM = forward_rows(D);
  static constexpr int kRowTiles = kBlockM / kTileSide;  // half of each is one warpgroup's
  static constexpr int kTermStages = 2;

  static constexpr int kSlabBytes = kTileSide * kRowBytes;
  static constexpr int kTermBytes = kTileSide / kSlab * kTerms * kRowBytes;  // of kTileSide pixels
  static constexpr int kAffinityBytes = kTileSide * kTileSide * 2;            // A of one row tile, to be transposed

  static constexpr int kFeatRows = 0;
  static constexpr int kTermRows = kFeatRows + kRowTiles * kSlabs * kSlabBytes;
  static constexpr int kAffinity = kTermRows + kRowTiles * kTermBytes;
  static constexpr int kTermColumns = kAffinity + kAffinityBytes;
  static constexpr int kFeatColumns = kTermColumns + kTermStages * kTermBytes;
  static constexpr int kStages = stages(kFeatColumns, kSlabBytes);
  static constexpr int kBarriers = kFeatColumns + kStages * kSlabBytes;
  static constexpr int kShared = kBarriers + kBarrierBytes;
  static_assert(kStages >= 2 && kShared <= kSharedLimit);
};

// Backward: row blocks of kBlockM rows; tiles of kBlockN columns, each one stage.
template <int D, int P>
struct BackwardTiles {
  static constexpr int kTerms = 2 * P;
  static constexpr int kSlabs = D / kSlab;
  static constexpr int kBlockM = kTileSide;
  static constexpr int kBlockN = backward_columns(D);

  static constexpr int kRowSlabBytes = kBlockM * kRowBytes, kColumnSlabBytes = kBlockN * kRowBytes;
  static constexpr int kMapBytes = kTerms * kRowBytes;  // terms or pairs of kSlab pixels
  static constexpr int kTermBytes = kBlockN / kSlab * kMapBytes;

  static constexpr int kFeatRows = 0;
  static constexpr int kPairRows = kFeatRows + kSlabs * kRowSlabBytes;
  static constexpr int kColumnStages = kPairRows + kBlockM / kSlab * kMapBytes;
  // within a stage
  static constexpr int kFeat = 0;
  static constexpr int kTerm = kFeat + kSlabs * kColumnSlabBytes;
  static constexpr int kPair = kTerm + kTermBytes;
  static constexpr int kStageBytes = kPair + kTermBytes;
  static constexpr int kStages = stages(kColumnStages, kStageBytes);
  static constexpr int kBarriers = kColumnStages + kStages * kStageBytes;
  static constexpr int kShared = kBarriers + kBarrierBytes;
  static_assert(kStages >= 2 && kShared <= kSharedLimit);
};

}  // namespace ercn::sm90::affinity
