#pragma once
// Backward as owner of rows. A block of threads keeps the features of 128 rows in shared memory and their gradients in
// registers, 64 rows in each consumer warpgroup, while tiles of columns stream by. For each tile
//   1. T = F_iᵀF_j;  A = relu(T) rounded to 16 bits in registers: also the mask 1[T>0]
//   2. grad_value_i += A_ij G_jᵀ, G in two terms, where value needs a gradient
//   3. W = 1[T>0] ⊙ (V_iᵀG_j + G_iᵀV_j), one product of depth 2 P of fp16 pairs scaled by powers of two (affinity_prepare.h)
//   4. grad_feat_i += W_ij F_jᵀ, W rounded to 16 bits in registers
// W is symmetric, so the one product F·W is all of the gradient. Nothing is atomic.
#include <arch/convert.h>
#include <arch/hopper.h>
#include <arch/launch.h>
#include <arch/wgmma.h>

#include "affinity_ring.h"
#include "affinity_schedule.h"

namespace ercn::sm90::affinity {

template <typename Element, int D, int P>
struct Backward {
  using Tiles = BackwardTiles<D, P>;
  static constexpr int kThreads = kBlockThreads, kMinBlocks = 1;
  static constexpr int kTerms = Tiles::kTerms, kChunks = Tiles::kChunks, kColumns = Tiles::kColumns;
  static constexpr int kSteps = kColumns / 16;  // of wgmma, where K runs over the columns

  struct Params {
    // [B, N, D] in boxes of [128, 64] and of [columns, 64]; terms [B, 2 P, padded pixels] in boxes of [2 P, 64];
    // pairs alike, V' then G', in boxes of [P, 64]
    arch::TensorMap feat_rows, feat_columns, terms, pairs;
    Schedule schedule;
    float* feat_sums;   // [slots, rows, D]
    float* value_sums;  // [slots, P, rows], or null where value needs no gradient
  };

  struct Barriers {
    Stage rows, columns[kMostStages];
  };

  ERCN_DEVICE static void run(const Params& params, unsigned char* shared) {
    Barriers& barriers = *reinterpret_cast<Barriers*>(shared + Tiles::kBarriers);
    if (arch::thread_index() == 0) {
      barriers.rows.init();
      for (Stage& stage : barriers.columns) stage.init();
      arch::fence_barrier_init();
    }
    arch::sync_threads();
    const int64_t begin = params.schedule.begin(arch::block_index().x);
    const int tiles = static_cast<int>(params.schedule.begin(arch::block_index().x + 1) - begin);
    if (arch::warp_index() / 4 == kConsumers) {
      arch::lower_registers<kRegistersProducer>();
      if (arch::warp_index() % 4 == 0 && arch::elect_one()) load(params, shared, barriers, begin, tiles);
    } else {
      arch::raise_registers<kRegistersConsumer>();
      compute(params, shared, barriers, begin, tiles);
    }
  }

  ERCN_DEVICE static void load(
      const Params& params, unsigned char* shared, Barriers& barriers, int64_t begin, int tiles) {
    Ring<1> rows{&barriers.rows};
    Ring<Tiles::kStages> columns{barriers.columns};
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

  ERCN_DEVICE static void load_rows(const Params& params, arch::Barrier* full, unsigned char* shared, const Tile& tile) {
    arch::barrier_arrive_expect(full, Tiles::kColumnStages);
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
      const Params& params, arch::Barrier* full, unsigned char* stage, int column, int image) {
    arch::barrier_arrive_expect(full, params.value_sums == nullptr ? kStageWithoutTerms : Tiles::kStageBytes);
    for (int k = 0; k < kChunks; ++k) {
      unsigned char* to = stage + Tiles::kFeat + k * Tiles::kColumnChunkBytes;
      arch::tma_load(to, params.feat_columns, full, k * kChunk, column, image);
    }
    for (int k = 0; k < kColumns / kChunk; ++k) {
      const int pixel = column + k * kChunk, at = k * Tiles::kMapBytes;
      if (params.value_sums != nullptr) arch::tma_load(stage + Tiles::kTerm + at, params.terms, full, pixel, 0, image);
      load_pairs(params, full, stage + Tiles::kPair + at, pixel, image, P);
    }
  }

  static constexpr int kStageWithoutTerms = Tiles::kStageBytes - kColumns / kChunk * Tiles::kMapBytes;

  // 64 pixels of V' and G', the one at row `first` of the pairs (0 or P) before the other.
  ERCN_DEVICE static void load_pairs(
      const Params& params, arch::Barrier* full, unsigned char* to, int pixel, int image, int first) {
    arch::tma_load(to, params.pairs, full, pixel, first, image);
    arch::tma_load(to + P * kRowBytes, params.pairs, full, pixel, P - first, image);
  }

  ERCN_DEVICE static void compute(
      const Params& params, unsigned char* shared, Barriers& barriers, int64_t begin, int tiles) {
    const int warpgroup = arch::warp_index() / 4;
    Ring<1> rows{&barriers.rows};
    Ring<Tiles::kStages> columns{barriers.columns};
    Tile tile = params.schedule.tile(begin);
    for (int left = tiles; left > 0; tile = params.schedule.next_group(tile)) {
      float grad_feat[D / 2] = {}, grad_value[P] = {};
      rows.wait_full();
      const int segment = params.schedule.segment(tile, left);
      left -= segment;
      for (int i = 0; i < segment; ++i) {
        columns.wait_full();
        const unsigned char* stage = shared + Tiles::kColumnStages + columns.index * Tiles::kStageBytes;
        uint32_t a[kSteps][4];
        affinities(a, shared, stage, warpgroup);
        if (params.value_sums != nullptr) value_sums(grad_value, a, stage + Tiles::kTerm);
#pragma unroll
        for (int part = 0; part < kColumns / kChunk; ++part) {
          uint32_t w[kChunk / 16][4];
          weights(w, a, part, shared, stage + Tiles::kPair, warpgroup);
          feat_sums(grad_feat, w, part, stage + Tiles::kFeat);
        }
        columns.stage().release();
        columns.advance();
      }
      rows.stage().release();
      rows.advance();
      const int64_t slot = arch::block_index().x + params.schedule.ordinal(tile.image, tile.group);
      store_feat(params.feat_sums + slot * Tiles::kRows * D, grad_feat, warpgroup);
      if (params.value_sums != nullptr) store_value(params.value_sums + slot * P * Tiles::kRows, grad_value, warpgroup);
    }
  }

  // A = relu(F_iᵀF_j) as left factors of wgmma; zero exactly where T <= 0, or too small for 16 bits.
  ERCN_DEVICE static void affinities(
      uint32_t (&a)[kSteps][4], const unsigned char* shared, const unsigned char* stage, int warpgroup) {
    float t[kColumns / 2];
    arch::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const arch::Operand row =
          arch::operand_k(shared + Tiles::kFeatRows + k * Tiles::kRowChunkBytes + warpgroup * 64 * kRowBytes);
      const arch::Operand column = arch::operand_k(stage + Tiles::kFeat + k * Tiles::kColumnChunkBytes);
#pragma unroll
      for (int s = 0; s < kChunk / 16; ++s) {
        arch::wgmma<Element, kColumns, arch::Major::kK, arch::Major::kK>(
            t, arch::advance(row, s * kStepColumns), arch::advance(column, s * kStepColumns), k + s > 0);
      }
    }
    arch::wgmma_commit();
    arch::wgmma_wait<0>();
    arch::pin(t);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[s][i] = arch::pack_relu<Element>(t[8 * s + 2 * i], t[8 * s + 2 * i + 1]);
    }
  }

  // grad_value_i += A_ij G_jᵀ
  ERCN_DEVICE static void value_sums(float (&sums)[P], const uint32_t (&a)[kSteps][4], const unsigned char* terms) {
    arch::pin(sums);
    arch::wgmma_fence();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int at = s / 4 * Tiles::kMapBytes + s % 4 * kStepColumns;
      arch::wgmma<Element, kTerms, arch::Major::kK>(sums, a[s], arch::advance(arch::operand_k(terms), at), true);
    }
    arch::wgmma_commit();
    arch::wgmma_wait<0>();
    arch::pin(sums);
  }

  // W = 1[T>0] ⊙ (V_iᵀG_j + G_iᵀV_j) of 64 columns as left factors of wgmma. T = NaN passes, as in torch.
  ERCN_DEVICE static void weights(
      uint32_t (&w)[kChunk / 16][4], const uint32_t (&a)[kSteps][4], int part, const unsigned char* shared,
      const unsigned char* pairs, int warpgroup) {
    float u[kChunk / 2];
    const arch::Operand row = arch::operand_mn(shared + Tiles::kPairRows + warpgroup * Tiles::kMapBytes, Tiles::kMapBytes);
    const arch::Operand column = arch::operand_mn(pairs + part * Tiles::kMapBytes, Tiles::kMapBytes);
    arch::wgmma_fence();
#pragma unroll
    for (int s = 0; s < kTerms / 16; ++s) {
      arch::wgmma<arch::fp16, kChunk, arch::Major::kMN, arch::Major::kMN>(
          u, arch::advance(row, s * kStepRows), arch::advance(column, s * kStepRows), s > 0);
    }
    arch::wgmma_commit();
    arch::wgmma_wait<0>();
    arch::pin(u);
#pragma unroll
    for (int s = 0; s < kChunk / 16; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t mask = arch::nonzero_mask<Element>(a[part * (kChunk / 16) + s][i]);
        w[s][i] = arch::pack<Element>(u[8 * s + 2 * i], u[8 * s + 2 * i + 1]) & mask;
      }
    }
  }

  // grad_feat_i += W_ij F_jᵀ of 64 columns
  ERCN_DEVICE static void feat_sums(
      float (&sums)[D / 2], const uint32_t (&w)[kChunk / 16][4], int part, const unsigned char* feat) {
    const arch::Operand column = arch::operand_mn(feat + part * kChunk * kRowBytes, Tiles::kColumnChunkBytes);
    arch::pin(sums);
    arch::wgmma_fence();
#pragma unroll
    for (int s = 0; s < kChunk / 16; ++s) {
      arch::wgmma<Element, D, arch::Major::kMN>(sums, w[s], arch::advance(column, s * kStepRows), true);
    }
    arch::wgmma_commit();
    arch::wgmma_wait<0>();
    arch::pin(sums);
  }

  // Accumulators of 64 rows: lane l has columns 8 q + 2 (l % 4) + {0, 1} of rows l / 4 and l / 4 + 8 of its warp's 16.
  ERCN_DEVICE static int own_row(int warpgroup) {
    return warpgroup * 64 + arch::warp_index() % 4 * 16 + arch::lane_index() / 4;
  }

  // -> to[row][feature]
  ERCN_DEVICE static void store_feat(float* to, const float (&sums)[D / 2], int warpgroup) {
    float* own = to + own_row(warpgroup) * D + arch::lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < D / 2; i += 2) {
      float* at = own + i / 2 % 2 * 8 * D + i / 4 * 8;
      at[0] = sums[i];
      at[1] = sums[i + 1];
    }
  }

  // -> to[channel][row], both terms added
  ERCN_DEVICE static void store_value(float* to, const float (&sums)[P], int warpgroup) {
#pragma unroll
    for (int i = 0; i < P / 2; ++i) {
      const int channel = i / 4 * 8 + arch::lane_index() % 4 * 2 + i % 2;
      to[channel * Tiles::kRows + own_row(warpgroup) + i / 2 % 2 * 8] = sums[i] + sums[i + P / 2];
    }
  }
};

}  // namespace ercn::sm90::affinity
