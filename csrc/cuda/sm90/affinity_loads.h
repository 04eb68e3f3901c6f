#pragma once
// The loading thread: rows once for each segment of the schedule, columns tile by tile, all by the tensor copy engine.
#include "affinity_params.h"
#include "affinity_ring.h"

namespace ercn::sm90::affinity {

// Barriers as the kernels have them: the backward's tiles of columns come whole, terms with features.
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
      rows.wait_free();
      load_rows(params, &rows.stage().full, shared, tile);
      rows.advance();
      const int segment = params.schedule.segment(tile, left);
      left -= segment;
      for (int column = tile.column; column < tile.column + segment; ++column) {
        terms.wait_free();
        arch::barrier_arrive_expect(&terms.stage().full, Tiles::kTermBytes);
        unsigned char* to = shared + Tiles::kTermColumns + terms.index * Tiles::kTermBytes;
        load_terms(params, &terms.stage().full, to, column * kPixels, tile.image);
        terms.advance();
        for (int k = 0; k < kChunks; ++k) {
          feat.wait_free();
          arch::barrier_arrive_expect(&feat.stage().full, Tiles::kChunkBytes);
          unsigned char* chunk = shared + Tiles::kFeatColumns + feat.index * Tiles::kChunkBytes;
          arch::tma_load(chunk, params.feat, &feat.stage().full, k * kChunk, column * kPixels, tile.image);
          feat.advance();
        }
      }
    }
  }

  ERCN_DEVICE static void load_rows(
      const ForwardParams& params, arch::Barrier* full, unsigned char* shared, const Tile& tile) {
    arch::barrier_arrive_expect(full, Tiles::kAffinity - Tiles::kFeatRows);
    for (int r = 0; r < Tiles::kRowTiles; ++r) {
      const int row = tile.group * Tiles::kRows + r * kPixels;
      for (int k = 0; k < kChunks; ++k) {
        unsigned char* to = shared + Tiles::kFeatRows + (r * kChunks + k) * Tiles::kChunkBytes;
        arch::tma_load(to, params.feat, full, k * kChunk, row, tile.image);
      }
      load_terms(params, full, shared + Tiles::kTermRows + r * Tiles::kTermBytes, row, tile.image);
    }
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
      rows.wait_free();
      load_rows(params, &rows.stage().full, shared, tile);
      rows.advance();
      const int segment = params.schedule.segment(tile, left);
      left -= segment;
      for (int column = tile.column; column < tile.column + segment; ++column) {
        columns.wait_free();
        unsigned char* stage = shared + Tiles::kColumnStages + columns.index * Tiles::kStageBytes;
        load_columns(params, &columns.stage().full, stage, column * kColumns, tile.image);
        columns.advance();
      }
    }
  }

  ERCN_DEVICE static void load_rows(
      const BackwardParams& params, arch::Barrier* full, unsigned char* shared, const Tile& tile) {
    arch::barrier_arrive_expect(full, Tiles::kColumnStages - Tiles::kFeatRows);
    const int row = tile.group * Tiles::kRows;
    for (int k = 0; k < kChunks; ++k) {
      unsigned char* to = shared + Tiles::kFeatRows + k * Tiles::kRowChunkBytes;
      arch::tma_load(to, params.feat_rows, full, k * kChunk, row, tile.image);
    }
    for (int k = 0; k < Tiles::kRows / kChunk; ++k) {
      load_pairs(params, full, shared + Tiles::kPairRows + k * Tiles::kMapBytes, row + k * kChunk, tile.image, 0);
    }
  }

  ERCN_DEVICE static void load_columns(
      const BackwardParams& params, arch::Barrier* full, unsigned char* stage, int column, int image) {
    const bool with_terms = params.value_sums != nullptr;
    arch::barrier_arrive_expect(full, with_terms ? Tiles::kStageBytes : Tiles::kStageBytes - Tiles::kTermBytes);
    for (int k = 0; k < kChunks; ++k) {
      unsigned char* to = stage + Tiles::kFeat + k * Tiles::kColumnChunkBytes;
      arch::tma_load(to, params.feat_columns, full, k * kChunk, column, image);
    }
    for (int k = 0; k < kColumns / kChunk; ++k) {
      const int pixel = column + k * kChunk, at = k * Tiles::kMapBytes;
      if (with_terms) arch::tma_load(stage + Tiles::kTerm + at, params.terms, full, pixel, 0, image);
      load_pairs(params, full, stage + Tiles::kPair + at, pixel, image, P);
    }
  }

  // 64 pixels of V' and G', the one at row `first` of the pairs (0 or P) before the other.
  ERCN_DEVICE static void load_pairs(
      const BackwardParams& params, arch::Barrier* full, unsigned char* to, int pixel, int image, int first) {
    arch::tma_load(to, params.pairs, full, pixel, first, image);
    arch::tma_load(to + P * kRowBytes, params.pairs, full, pixel, P - first, image);
  }
};

}  // namespace ercn::sm90::affinity
