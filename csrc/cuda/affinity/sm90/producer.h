#pragma once
// The producer thread: TMA loads rows once a span of the scheduler, and columns tile by tile.
#include <arch/ring.h>

#include "affinity/sm90/launch.h"

namespace ercn::sm90::affinity {

// The pipeline of a block: the rows of a span, and the stages of streamed columns.
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

// A stage of the backward holds a tile of columns with its terms.
template <typename Tiles>
using ForwardBarriers = Barriers<Tiles::kTermStages, Tiles::kStages>;
template <typename Tiles>
using BackwardBarriers = Barriers<1, Tiles::kStages>;

template <typename Tiles>
struct ForwardProducer {
  static constexpr int kSlabs = Tiles::kSlabs;

  ERCN_DEVICE static void run(
      const ForwardParams& params, unsigned char* shared, ForwardBarriers<Tiles>& barriers, int64_t begin, int tiles) {
    Ring<1> rows{&barriers.rows};
    Ring<Tiles::kTermStages> terms{barriers.terms};
    Ring<Tiles::kStages> feat{barriers.feat};
    WorkTile tile = params.scheduler.tile(begin);
    for (int left = tiles; left > 0; tile = params.scheduler.next_row_block(tile)) {
      load_rows(params, rows, shared, tile);
      const int span = params.scheduler.span(tile, left);
      left -= span;
      for (int column = tile.column; column < tile.column + span; ++column) {
        unsigned char* to = shared + Tiles::kTermColumns + terms.index * Tiles::kTermBytes;
        terms.load(Tiles::kTermBytes, [&](arch::Barrier* full) {
          load_terms(params, full, to, column * kTileSide, tile.image);
        });
        for (int k = 0; k < kSlabs; ++k) {
          unsigned char* slab = shared + Tiles::kFeatColumns + feat.index * Tiles::kSlabBytes;
          feat.load(Tiles::kSlabBytes, [&](arch::Barrier* full) {
            arch::tma_load(slab, params.feat, full, k * kSlab, column * kTileSide, tile.image);
          });
        }
      }
    }
  }

  ERCN_DEVICE static void load_rows(
      const ForwardParams& params, Ring<1>& rows, unsigned char* shared, const WorkTile& tile) {
    rows.load(Tiles::kAffinity - Tiles::kFeatRows, [&](arch::Barrier* full) {
      for (int r = 0; r < Tiles::kRowTiles; ++r) {
        const int row = tile.row_block * Tiles::kBlockM + r * kTileSide;
        for (int k = 0; k < kSlabs; ++k) {
          unsigned char* to = shared + Tiles::kFeatRows + (r * kSlabs + k) * Tiles::kSlabBytes;
          arch::tma_load(to, params.feat, full, k * kSlab, row, tile.image);
        }
        load_terms(params, full, shared + Tiles::kTermRows + r * Tiles::kTermBytes, row, tile.image);
      }
    });
  }

  ERCN_DEVICE static void load_terms(
      const ForwardParams& params, arch::Barrier* full, unsigned char* to, int pixel, int image) {
    for (int k = 0; k < kTileSide / kSlab; ++k) {
      arch::tma_load(to + k * Tiles::kTerms * kRowBytes, params.terms, full, pixel + k * kSlab, 0, image);
    }
  }
};

template <typename Tiles, int P>
struct BackwardProducer {
  static constexpr int kSlabs = Tiles::kSlabs, kBlockN = Tiles::kBlockN;

  ERCN_DEVICE static void run(
      const BackwardParams& params, unsigned char* shared, BackwardBarriers<Tiles>& barriers, int64_t begin,
      int tiles) {
    Ring<1> rows{&barriers.rows};
    Ring<Tiles::kStages> columns{barriers.feat};
    WorkTile tile = params.scheduler.tile(begin);
    for (int left = tiles; left > 0; tile = params.scheduler.next_row_block(tile)) {
      load_rows(params, rows, shared, tile);
      const int span = params.scheduler.span(tile, left);
      left -= span;
      for (int column = tile.column; column < tile.column + span; ++column) {
        load_columns(params, columns, shared, column * kBlockN, tile.image);
      }
    }
  }

  ERCN_DEVICE static void load_rows(
      const BackwardParams& params, Ring<1>& rows, unsigned char* shared, const WorkTile& tile) {
    const int row = tile.row_block * Tiles::kBlockM;
    rows.load(Tiles::kColumnStages - Tiles::kFeatRows, [&](arch::Barrier* full) {
      for (int k = 0; k < kSlabs; ++k) {
        unsigned char* to = shared + Tiles::kFeatRows + k * Tiles::kRowSlabBytes;
        arch::tma_load(to, params.feat_rows, full, k * kSlab, row, tile.image);
      }
      for (int k = 0; k < Tiles::kBlockM / kSlab; ++k) {
        load_pairs(params, full, shared + Tiles::kPairRows + k * Tiles::kMapBytes, row + k * kSlab, tile.image, 0);
      }
    });
  }

  ERCN_DEVICE static void load_columns(
      const BackwardParams& params, Ring<Tiles::kStages>& columns, unsigned char* shared, int column, int image) {
    const bool with_terms = params.value_sums != nullptr;
    unsigned char* stage = shared + Tiles::kColumnStages + columns.index * Tiles::kStageBytes;
    columns.load(with_terms ? Tiles::kStageBytes : Tiles::kStageBytes - Tiles::kTermBytes, [&](arch::Barrier* full) {
      for (int k = 0; k < kSlabs; ++k) {
        unsigned char* to = stage + Tiles::kFeat + k * Tiles::kColumnSlabBytes;
        arch::tma_load(to, params.feat_columns, full, k * kSlab, column, image);
      }
      for (int k = 0; k < kBlockN / kSlab; ++k) {
        const int pixel = column + k * kSlab, at = k * Tiles::kMapBytes;
        if (with_terms) arch::tma_load(stage + Tiles::kTerm + at, params.terms, full, pixel, 0, image);
        load_pairs(params, full, stage + Tiles::kPair + at, pixel, image, P);
      }
    });
  }

  // 64 pixels of V' and G', first the one at row `first` of the pairs, 0 or P.
  ERCN_DEVICE static void load_pairs(
      const BackwardParams& params, arch::Barrier* full, unsigned char* to, int pixel, int image, int first) {
    arch::tma_load(to, params.pairs, full, pixel, first, image);
    arch::tma_load(to + P * kRowBytes, params.pairs, full, pixel, P - first, image);
  }
};

}  // namespace ercn::sm90::affinity
