#pragma once
// The loading thread: rows once for each segment of the schedule, columns tile by tile, all by the tensor copy engine.
#include "affinity/sm90/params.h"
#include "affinity/sm90/tiles.h"
#include <arch/ring.h>

namespace ercn::sm90::affinity {

// The whole of a block's stages: of the rows that stay, and of what streams by.
template <int TERM_STAGES, int FEAT_STAGES>
struct Barriers {
  Stage rows, terms[TERM_STAGES], feat[FEAT_STAGES];

  ERCN_DEVICE void init() {
    constexpr int kWarps = kConsumers * kWarpgroup / 32;
    init_stages([&] {
      rows.init(kWarps);
      for (Stage& stage : terms) stage.init(kWarps);
      for (Stage& stage : feat) stage.init(kWarps);
    });
  }
};

// As the kernels have them: the backward's tiles of columns come whole, terms with features.
template <typename Tiles>
using ForwardBarriers = Barriers<Tiles::kTermStages, Tiles::kStages>;
template <typename Tiles>
using BackwardBarriers = Barriers<1, Tiles::kStages>;

template <typename Tiles>
struct ForwardLoads {
  static constexpr int kChunks = Tiles::kChunks;

  ERCN_DEVICE static void run(
      const ForwardParams& params, unsigned char* shared, ForwardBarriers<Tiles>& barriers, int64_t begin, int tiles) {
    Ring<1> rows{&barriers.rows};
    Ring<Tiles::kTermStages> terms{barriers.terms};
    Ring<Tiles::kStages> feat{barriers.feat};
    Tile tile = params.schedule.tile(begin);
    for (int left = tiles; left > 0; tile = params.schedule.next_group(tile)) {
      load_rows(params, rows, shared, tile);
      const int segment = params.schedule.segment(tile, left);
      left -= segment;
      for (int column = tile.column; column < tile.column + segment; ++column) {
        unsigned char* to = shared + Tiles::kTermColumns + terms.index * Tiles::kTermBytes;
        terms.load(Tiles::kTermBytes, [&](arch::Barrier* full) {
          load_terms(params, full, to, column * kPixels, tile.image);
        });
        for (int k = 0; k < kChunks; ++k) {
          unsigned char* chunk = shared + Tiles::kFeatColumns + feat.index * Tiles::kChunkBytes;
          feat.load(Tiles::kChunkBytes, [&](arch::Barrier* full) {
            arch::tma_load(chunk, params.feat, full, k * kChunk, column * kPixels, tile.image);
          });
        }
      }
    }
  }

  ERCN_DEVICE static void load_rows(
      const ForwardParams& params, Ring<1>& rows, unsigned char* shared, const Tile& tile) {
    rows.load(Tiles::kAffinity - Tiles::kFeatRows, [&](arch::Barrier* full) {
      for (int r = 0; r < Tiles::kRowTiles; ++r) {
        const int row = tile.group * Tiles::kRows + r * kPixels;
        for (int k = 0; k < kChunks; ++k) {
          unsigned char* to = shared + Tiles::kFeatRows + (r * kChunks + k) * Tiles::kChunkBytes;
          arch::tma_load(to, params.feat, full, k * kChunk, row, tile.image);
        }
        load_terms(params, full, shared + Tiles::kTermRows + r * Tiles::kTermBytes, row, tile.image);
      }
    });
  }

  ERCN_DEVICE static void load_terms(
      const ForwardParams& params, arch::Barrier* full, unsigned char* to, int pixel, int image) {
    for (int k = 0; k < kPixels / kChunk; ++k) {
      arch::tma_load(to + k * Tiles::kTerms * kRowBytes, params.terms, full, pixel + k * kChunk, 0, image);
    }
  }
};

template <typename Tiles, int P>
struct BackwardLoads {
  static constexpr int kChunks = Tiles::kChunks, kColumns = Tiles::kColumns;

  ERCN_DEVICE static void run(
      const BackwardParams& params, unsigned char* shared, BackwardBarriers<Tiles>& barriers, int64_t begin,
      int tiles) {
    Ring<1> rows{&barriers.rows};
    Ring<Tiles::kStages> columns{barriers.feat};
    Tile tile = params.schedule.tile(begin);
    for (int left = tiles; left > 0; tile = params.schedule.next_group(tile)) {
      load_rows(params, rows, shared, tile);
      const int segment = params.schedule.segment(tile, left);
      left -= segment;
      for (int column = tile.column; column < tile.column + segment; ++column) {
        load_columns(params, columns, shared, column * kColumns, tile.image);
      }
    }
  }

  ERCN_DEVICE static void load_rows(
      const BackwardParams& params, Ring<1>& rows, unsigned char* shared, const Tile& tile) {
    const int row = tile.group * Tiles::kRows;
    rows.load(Tiles::kColumnStages - Tiles::kFeatRows, [&](arch::Barrier* full) {
      for (int k = 0; k < kChunks; ++k) {
        unsigned char* to = shared + Tiles::kFeatRows + k * Tiles::kRowChunkBytes;
        arch::tma_load(to, params.feat_rows, full, k * kChunk, row, tile.image);
      }
      for (int k = 0; k < Tiles::kRows / kChunk; ++k) {
        load_pairs(params, full, shared + Tiles::kPairRows + k * Tiles::kMapBytes, row + k * kChunk, tile.image, 0);
      }
    });
  }

  ERCN_DEVICE static void load_columns(
      const BackwardParams& params, Ring<Tiles::kStages>& columns, unsigned char* shared, int column, int image) {
    const bool with_terms = params.value_sums != nullptr;
    unsigned char* stage = shared + Tiles::kColumnStages + columns.index * Tiles::kStageBytes;
    columns.load(with_terms ? Tiles::kStageBytes : Tiles::kStageBytes - Tiles::kTermBytes, [&](arch::Barrier* full) {
      for (int k = 0; k < kChunks; ++k) {
        unsigned char* to = stage + Tiles::kFeat + k * Tiles::kColumnChunkBytes;
        arch::tma_load(to, params.feat_columns, full, k * kChunk, column, image);
      }
      for (int k = 0; k < kColumns / kChunk; ++k) {
        const int pixel = column + k * kChunk, at = k * Tiles::kMapBytes;
        if (with_terms) arch::tma_load(stage + Tiles::kTerm + at, params.terms, full, pixel, 0, image);
        load_pairs(params, full, stage + Tiles::kPair + at, pixel, image, P);
      }
    });
  }

  // 64 pixels of V' and G', the one at row `first` of the pairs (0 or P) before the other.
  ERCN_DEVICE static void load_pairs(
      const BackwardParams& params, arch::Barrier* full, unsigned char* to, int pixel, int image, int first) {
    arch::tma_load(to, params.pairs, full, pixel, first, image);
    arch::tma_load(to + P * kRowBytes, params.pairs, full, pixel, P - first, image);
  }
};

}  // namespace ercn::sm90::affinity
