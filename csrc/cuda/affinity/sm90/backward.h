#pragma once
// Hopper backward. A block of threads keeps the features of 128 rows in shared memory and their gradients in registers,
// 64 rows in each consumer warpgroup, while tiles of columns stream by. The mainloop, for each tile:
//   1. T = F_iᵀF_j;  A = relu(T) rounded to 16 bits in registers, which is also the mask 1[T>0]
//   2. grad_value_i += A_ij G_jᵀ, G in two terms, where value needs a gradient
//   3. W = 1[T>0] ⊙ (V_iᵀG_j + G_iᵀV_j), one product of depth 2 P of fp16 pairs scaled by powers of two
//   4. grad_feat_i += W_ij F_jᵀ, W rounded to 16 bits in registers
// W is symmetric, so F·W is the whole gradient. No addition is atomic. Steps 3 and 4 take 64 columns at a time, which
// leaves registers for the gradients of 192 features; a tile's last step 4 overlaps the next tile's T.
//
// Tensor cores truncate their sums: each of N / 16 steps loses at most a unit of fp32's last place, half of one on
// average. The sums of a tile of grad_value are therefore added to the total in fp32. grad_feat has no registers for
// that: a sum that grows evenly loses about N / 16 · 2^-25 of itself, 3e-5 with 16,384 pixels and 1.2e-4 with 65,536,
// where rounding to its type takes up to 2^-9 (bf16) or 2^-11 (fp16).
#include <arch/convert.h>
#include <arch/hopper.h>
#include <arch/wgmma.h>

#include "affinity/sm90/epilogue.h"
#include "affinity/sm90/producer.h"

namespace ercn::sm90::affinity {

template <typename Element, int D, int P>
struct Backward {
  using Tiles = BackwardTiles<D, P>;
  using Params = BackwardParams;
  static constexpr int kThreads = kBlockThreads, kMinBlocks = 1;
  static constexpr int kTerms = Tiles::kTerms, kBlockN = Tiles::kBlockN;
  static constexpr int kSteps = kBlockN / 16, kPartSteps = kSlab / 16;  // wgmmas whose K runs over columns
  // Whether registers hold a tile's grad_value beside all sums, A, and W before it is rounded.
  static constexpr bool kValueBesideWeights = D / 2 + 2 * P + 4 * kSteps + kSlab / 2 <= 208;

  ERCN_DEVICE static void run(const Params& params, unsigned char* shared) {
    auto& barriers = *reinterpret_cast<BackwardBarriers<Tiles>*>(shared + Tiles::kBarriers);
    barriers.init();
    const int64_t begin = params.scheduler.begin(arch::block_index().x);
    const int tiles = static_cast<int>(params.scheduler.begin(arch::block_index().x + 1) - begin);
    const int warp = arch::uniform_warp_index();
    if (warp / 4 == kConsumers) {
      arch::lower_registers<kRegistersProducer>();
      if (warp % 4 == 0 && arch::elect_one()) {
        BackwardProducer<Tiles, P>::run(params, shared, barriers, begin, tiles);
      }
    } else {
      arch::raise_registers<kRegistersConsumer>();
      mainloop(params, shared, barriers, begin, tiles, warp / 4);
    }
  }

  ERCN_DEVICE static void mainloop(
      const Params& params, unsigned char* shared, BackwardBarriers<Tiles>& barriers, int64_t begin, int tiles,
      int warpgroup) {
    Ring<1> rows{&barriers.rows};
    Ring<Tiles::kStages> columns{barriers.feat};
    Ring<Tiles::kStages> used = columns;  // the oldest stage that is not released
    WorkTile tile = params.scheduler.tile(begin);
    for (int left = tiles; left > 0; tile = params.scheduler.next_row_block(tile)) {
      float grad_feat[D / 2] = {}, grad_value[P] = {};
      rows.wait_full();
      const int span = params.scheduler.span(tile, left);
      left -= span;
      for (int i = 0; i < span; ++i) {
        columns.wait_full();
        const unsigned char* stage = shared + Tiles::kColumnStages + columns.index * Tiles::kStageBytes;
        uint32_t a[kSteps][4];
        affinities(a, shared, stage, warpgroup);
        if (i > 0) {
          used.stage().release();
          used.advance();
        }
        float value[P];
        if (params.value_sums != nullptr) {
          multiply_value(value, a, stage + Tiles::kTerm);
          if (!kValueBesideWeights) {
            arch::wgmma_wait<0>();
            add(grad_value, value);
          }
        }
#pragma unroll
        for (int part = 0; part < kBlockN / kSlab; ++part) {
          uint32_t w[kPartSteps][4];
          weights(w, a, part, shared, stage + Tiles::kPair, warpgroup);
          if (kValueBesideWeights && part == 0 && params.value_sums != nullptr) add(grad_value, value);
          add_feat(grad_feat, w, stage + Tiles::kFeat + part * kSlab * kRowBytes);
        }
        columns.advance();
      }
      arch::wgmma_wait<0>();
      arch::pin(grad_feat);
      used.stage().release();
      used.advance();
      rows.stage().release();
      rows.advance();
      const int64_t slot = arch::block_index().x + params.scheduler.ordinal(tile.image, tile.row_block);
      store_rows(params.feat_sums + (slot * Tiles::kBlockM + warpgroup * 64) * D, grad_feat);
      if (params.value_sums != nullptr) {
        store_terms(params.value_sums + slot * P * Tiles::kBlockM + warpgroup * 64, Tiles::kBlockM, P, grad_value);
      }
    }
  }

  // A = relu(F_iᵀF_j) as left factors of wgmma; zero exactly where T <= 0, or too small for 16 bits. Waits for all
  // earlier wgmmas.
  ERCN_DEVICE static void affinities(
      uint32_t (&a)[kSteps][4], const unsigned char* shared, const unsigned char* stage, int warpgroup) {
    float t[kBlockN / 2];
    arch::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tiles::kSlabs; ++k) {
      const arch::Operand row =
          arch::operand_k(shared + Tiles::kFeatRows + k * Tiles::kRowSlabBytes + warpgroup * 64 * kRowBytes);
      const arch::Operand column = arch::operand_k(stage + Tiles::kFeat + k * Tiles::kColumnSlabBytes);
#pragma unroll
      for (int s = 0; s < kSlab / 16; ++s) {
        arch::wgmma<Element, kBlockN, arch::Major::kK, arch::Major::kK>(
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

  // A_ij G_jᵀ of one tile
  ERCN_DEVICE static void multiply_value(float (&sums)[P], const uint32_t (&a)[kSteps][4], const unsigned char* terms) {
    arch::wgmma_fence();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int at = s / kPartSteps * Tiles::kMapBytes + s % kPartSteps * kStepColumns;
      arch::wgmma<Element, kTerms, arch::Major::kK>(sums, a[s], arch::advance(arch::operand_k(terms), at), s > 0);
    }
    arch::wgmma_commit();
  }

  // W = 1[T>0] ⊙ (V_iᵀG_j + G_iᵀV_j) of 64 columns as left factors of wgmma. NaN in T counts as > 0, as in torch.
  ERCN_DEVICE static void weights(
      uint32_t (&w)[kPartSteps][4], const uint32_t (&a)[kSteps][4], int part, const unsigned char* shared,
      const unsigned char* pairs, int warpgroup) {
    float u[kSlab / 2];
    const arch::Operand row = arch::operand_mn(shared + Tiles::kPairRows + warpgroup * Tiles::kMapBytes, 0);
    const arch::Operand column = arch::operand_mn(pairs + part * Tiles::kMapBytes, 0);
    arch::wgmma_fence();
#pragma unroll
    for (int s = 0; s < kTerms / 16; ++s) {
      arch::wgmma<arch::fp16, kSlab, arch::Major::kMN, arch::Major::kMN>(
          u, arch::advance(row, s * kStepRows), arch::advance(column, s * kStepRows), s > 0);
    }
    arch::wgmma_commit();
    arch::wgmma_wait<0>();
    arch::pin(u);
#pragma unroll
    for (int s = 0; s < kPartSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t mask = arch::nonzero_mask<Element>(a[part * kPartSteps + s][i]);
        w[s][i] = arch::pack<Element>(u[8 * s + 2 * i], u[8 * s + 2 * i + 1]) & mask;
      }
    }
  }

  // grad_feat_i += W_ij F_jᵀ of 64 columns
  ERCN_DEVICE static void add_feat(
      float (&sums)[D / 2], const uint32_t (&w)[kPartSteps][4], const unsigned char* feat) {
    const arch::Operand column = arch::operand_mn(feat, Tiles::kColumnSlabBytes);
    arch::wgmma_fence();
#pragma unroll
    for (int s = 0; s < kPartSteps; ++s) {
      arch::wgmma<Element, D, arch::Major::kMN>(sums, w[s], arch::advance(column, s * kStepRows), true);
    }
    arch::wgmma_commit();
  }
};

}  // namespace ercn::sm90::affinity
