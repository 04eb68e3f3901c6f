#pragma once
// Hopper forward on tiles of A = relu(FᵀF). A block of threads keeps the features of a row block in shared memory and
// its sums V·A in registers while tiles of columns stream by. In the mainloop each consumer warpgroup, for each tile,
//   1. forms T of its 64 rows of every row tile, from shared memory;
//   2. rounds relu(T) to 16 bits in registers, where it is wgmma's left factor: out_i += A_ij V_jᵀ;
//   3. right of the row block's own square, also writes A to shared memory, whose transpose is the left factor of the
//      mirrored sums of 64 columns, Σ_i A_ij V_iᵀ over the row block's rows i. They go to the workspace.
// The epilogue stores out in the workspace. The two terms of V are 2 P columns of one product, whose sums it adds.
// Tensor cores truncate their sums, so those of a tile are added to the total in fp32.
#include <arch/convert.h>
#include <arch/hopper.h>
#include <arch/wgmma.h>

#include "affinity/sm90/epilogue.h"
#include "affinity/sm90/producer.h"

namespace ercn::sm90::affinity {

template <typename Element, int D, int P>
struct Forward {
  using Tiles = ForwardTiles<D, P>;
  using Params = ForwardParams;
  static constexpr int kThreads = kBlockThreads, kMinBlocks = 1;
  static constexpr int kRowTiles = Tiles::kRowTiles, kTerms = Tiles::kTerms;
  static constexpr int kSteps = kTileSide / 16;  // wgmmas whose K runs over a tile's pixels

  ERCN_DEVICE static void run(const Params& params, unsigned char* shared) {
    auto& barriers = *reinterpret_cast<ForwardBarriers<Tiles>*>(shared + Tiles::kBarriers);
    barriers.init();
    const int64_t begin = params.scheduler.begin(arch::block_index().x);
    const int tiles = static_cast<int>(params.scheduler.begin(arch::block_index().x + 1) - begin);
    const int warp = arch::uniform_warp_index();
    if (warp / 4 == kConsumers) {
      arch::lower_registers<kRegistersProducer>();
      if (warp % 4 == 0 && arch::elect_one()) {
        ForwardProducer<Tiles>::run(params, shared, barriers, begin, tiles);
      }
    } else {
      arch::raise_registers<kRegistersConsumer>();
      mainloop(params, shared, barriers, begin, tiles, warp / 4);
    }
  }

  ERCN_DEVICE static void mainloop(
      const Params& params, unsigned char* shared, ForwardBarriers<Tiles>& barriers, int64_t begin, int tiles,
      int warpgroup) {
    Ring<1> rows{&barriers.rows};
    Ring<Tiles::kTermStages> terms{barriers.terms};
    Ring<Tiles::kStages> feat{barriers.feat};
    WorkTile tile = params.scheduler.tile(begin);
    for (int left = tiles; left > 0; tile = params.scheduler.next_row_block(tile)) {
      float out[kRowTiles][P] = {};  // of 64 rows of each row tile: the sums of both terms
      rows.wait_full();
      const int span = params.scheduler.span(tile, left), end = tile.column + span;
      left -= span;
      const int first_mirrored = params.mirrored == nullptr ? end : params.scheduler.first_column(tile.row_block + 1);
      for (int column = tile.column; column < end; ++column) {
        uint32_t a[kRowTiles][kSteps][4];
        affinities(a, shared, feat, warpgroup);
        terms.wait_full();
        const unsigned char* column_terms = shared + Tiles::kTermColumns + terms.index * Tiles::kTermBytes;
        if (column < first_mirrored) {
          direct_sums(out, a, column_terms);
        } else {
          float mirrored[P];
          direct_and_mirrored_sums(out, mirrored, a, column_terms, shared, warpgroup);
          store_mirrored(params, tile, column, mirrored, warpgroup);
        }
        terms.stage().release();
        terms.advance();
      }
      rows.stage().release();
      rows.advance();
      const int64_t slot = arch::block_index().x + params.scheduler.ordinal(tile.image, tile.row_block);
      float* const direct = params.direct + slot * P * Tiles::kBlockM + warpgroup * 64;
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) store_terms(direct + r * kTileSide, Tiles::kBlockM, P, out[r]);
    }
  }

  // A = relu(F_iᵀF_j) of this warpgroup's rows, as left factors of wgmma.
  ERCN_DEVICE static void affinities(
      uint32_t (&a)[kRowTiles][kSteps][4], const unsigned char* shared, Ring<Tiles::kStages>& feat, int warpgroup) {
    float t[kRowTiles][kTileSide / 2];
    Ring<Tiles::kStages> used = feat;
#pragma unroll
    for (int k = 0; k < Tiles::kSlabs; ++k) {
      feat.wait_full();
      const arch::Operand columns = arch::operand_k(shared + Tiles::kFeatColumns + feat.index * Tiles::kSlabBytes);
      arch::wgmma_fence();
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const int slab = (r * Tiles::kSlabs + k) * Tiles::kSlabBytes;
        const arch::Operand row = arch::operand_k(shared + Tiles::kFeatRows + slab + warpgroup * 64 * kRowBytes);
#pragma unroll
        for (int s = 0; s < kSlab / 16; ++s) {
          arch::wgmma<Element, kTileSide, arch::Major::kK, arch::Major::kK>(
              t[r], arch::advance(row, s * kStepColumns), arch::advance(columns, s * kStepColumns), k + s > 0);
        }
      }
      arch::wgmma_commit();
      feat.advance();
      if (k > 0) {
        arch::wgmma_wait<1>();
        used.stage().release();
        used.advance();
      }
    }
    arch::wgmma_wait<0>();
    used.stage().release();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      arch::pin(t[r]);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[r][s][i] = arch::pack_relu<Element>(t[r][8 * s + 2 * i], t[r][8 * s + 2 * i + 1]);
      }
    }
  }

  // out_i += A_ij V_jᵀ
  ERCN_DEVICE static void direct_sums(
      float (&out)[kRowTiles][P], const uint32_t (&a)[kRowTiles][kSteps][4], const unsigned char* column_terms) {
    float sums[kRowTiles][P];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) multiply(sums[r], a[r], column_terms);
    arch::wgmma_wait<0>();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) add(out[r], sums[r]);
  }

  // The same, and mirrored_j = Σ A_ij V_iᵀ over the row block, for this warpgroup's 64 columns. While one row tile's
  // direct sums are formed, its A is written to shared memory.
  ERCN_DEVICE static void direct_and_mirrored_sums(
      float (&out)[kRowTiles][P], float (&mirrored)[P], const uint32_t (&a)[kRowTiles][kSteps][4],
      const unsigned char* column_terms, unsigned char* shared, int warpgroup) {
    unsigned char* const affinity = shared + Tiles::kAffinity;  // [columns / 64][rows, 64 columns]
    const arch::Operand columns = arch::operand_mn(affinity + warpgroup * kTileSide * kRowBytes, 0);
    float sums[P];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (r > 0) {
        arch::wgmma_wait<1>();  // for the direct sums of the row tile before
        add(out[r - 1], sums);
      }
      multiply(sums, a[r], column_terms);
      if (r > 0) arch::wgmma_wait<1>();                 // this warpgroup has read the row tile before,
      arch::named_barrier(1, kConsumers * kWarpgroup);  // and so has the other
      write_affinities(affinity, a[r], warpgroup);
      arch::fence_proxy_async();
      arch::named_barrier(2, kConsumers * kWarpgroup);
      const unsigned char* row_terms = shared + Tiles::kTermRows + r * Tiles::kTermBytes;
      arch::wgmma_fence();
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        arch::wgmma<Element, kTerms, arch::Major::kMN, arch::Major::kK>(
            mirrored, arch::advance(columns, s * kStepRows), term_step(row_terms, s), r + s > 0);
      }
      arch::wgmma_commit();
    }
    arch::wgmma_wait<0>();
    add(out[kRowTiles - 1], sums);
    arch::pin(mirrored);
  }

  // sums = A_ij V_jᵀ of one tile
  ERCN_DEVICE static void multiply(
      float (&sums)[P], const uint32_t (&a)[kSteps][4], const unsigned char* column_terms) {
    arch::wgmma_fence();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      arch::wgmma<Element, kTerms, arch::Major::kK>(sums, a[s], term_step(column_terms, s), s > 0);
    }
    arch::wgmma_commit();
  }

  // The right factor: pixels 16 s … 16 s + 15 of a tile of terms.
  ERCN_DEVICE static arch::Operand term_step(const unsigned char* terms, int s) {
    return arch::advance(arch::operand_k(terms), s / 4 * kTerms * kRowBytes + s % 4 * kStepColumns);
  }

  // Stores A of 64 rows in a tile's swizzle.
  ERCN_DEVICE static void write_affinities(unsigned char* affinity, const uint32_t (&a)[kSteps][4], int warpgroup) {
    const int lane = arch::lane_index(), row = warpgroup * 64 + arch::warp_index() % 4 * 16 + lane % 16;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      arch::stmatrix(affinity + s / 4 * kTileSide * kRowBytes + arch::swizzled(row, s % 4 * 32 + lane / 16 * 16), a[s]);
    }
  }

  ERCN_DEVICE static void store_mirrored(
      const Params& params, const WorkTile& tile, int column, const float (&mirrored)[P], int warpgroup) {
    const int64_t pixel = column * static_cast<int64_t>(kTileSide) + warpgroup * 64;
    const int64_t at = mirrored_offset(
        params.scheduler, params.width, Tiles::kBlockM, params.channels, tile.row_block, tile.image, 0, pixel);
    store_terms(params.mirrored + at, params.width, params.channels, mirrored);
  }
};

}  // namespace ercn::sm90::affinity
