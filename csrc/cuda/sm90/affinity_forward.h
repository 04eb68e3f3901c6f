#pragma once
// Forward on tiles of A = relu(FᵀF). A block of threads keeps the features of a group of rows in shared memory and their sums
// V·A in registers while tiles of columns stream by. For each tile, each consumer warpgroup
//   1. forms T of its 64 rows of every row tile, from shared memory;
//   2. rounds relu(T) to 16 bits in registers, where it is wgmma's left factor: out_i += A_ij V_jᵀ;
//   3. right of the group's own square, also writes A to shared memory, whose transpose is the left factor of the mirrored
//      sums of its 64 columns: Σ_i A_ij V_iᵀ over all rows of the group, which go to device memory, once.
// The two terms of V are 2 P columns of one product; their sums are added in fp32 at the end.
#include <arch/convert.h>
#include <arch/hopper.h>
#include <arch/launch.h>
#include <arch/wgmma.h>

#include "affinity_ring.h"
#include "affinity_schedule.h"

namespace ercn::sm90::affinity {

template <typename Element, int D, int P>
struct Forward {
  using Tiles = ForwardTiles<D, P>;
  static constexpr int kThreads = kBlockThreads, kMinBlocks = 1;
  static constexpr int kRowTiles = Tiles::kRowTiles, kTerms = Tiles::kTerms, kChunks = Tiles::kChunks;
  static constexpr int kSteps = kPixels / 16;  // of wgmma, where K runs over a tile's pixels

  struct Params {
    arch::TensorMap feat, terms;  // [B, N, D] in boxes of [128, 64]; [B, 2 P, padded pixels] in boxes of [2 P, 64]
    Schedule schedule;
    float* direct;    // [slots, P, rows of a group]
    float* mirrored;  // [groups, B, channels, width], pixels beyond the first group; null where A is dense
    int64_t width;
    int channels;
  };

  struct Barriers {
    Stage rows, terms[Tiles::kTermStages], feat[kMostStages];
  };

  ERCN_DEVICE static void run(const Params& params, unsigned char* shared) {
    Barriers& barriers = *reinterpret_cast<Barriers*>(shared + Tiles::kBarriers);
    if (arch::thread_index() == 0) {
      barriers.rows.init();
      for (Stage& stage : barriers.terms) stage.init();
      for (Stage& stage : barriers.feat) stage.init();
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

  ERCN_DEVICE static void load_rows(const Params& params, arch::Barrier* full, unsigned char* shared, const Tile& tile) {
    arch::barrier_arrive_expect(full, Tiles::kAffinity);
    for (int r = 0; r < kRowTiles; ++r) {
      const int row = tile.group * Tiles::kRows + r * kPixels;
      for (int k = 0; k < kChunks; ++k) {
        unsigned char* to = shared + Tiles::kFeatRows + (r * kChunks + k) * Tiles::kChunkBytes;
        arch::tma_load(to, params.feat, full, k * kChunk, row, tile.image);
      }
      load_terms(params, full, shared + Tiles::kTermRows + r * Tiles::kTermBytes, row, tile.image);
    }
  }

  ERCN_DEVICE static void load_terms(
      const Params& params, arch::Barrier* full, unsigned char* to, int pixel, int image) {
    for (int k = 0; k < kPixels / kChunk; ++k) {
      arch::tma_load(to + k * kTerms * kRowBytes, params.terms, full, pixel + k * kChunk, 0, image);
    }
  }

  ERCN_DEVICE static void compute(
      const Params& params, unsigned char* shared, Barriers& barriers, int64_t begin, int tiles) {
    const int warpgroup = arch::warp_index() / 4;
    Ring<1> rows{&barriers.rows};
    Ring<Tiles::kTermStages> terms{barriers.terms};
    Ring<Tiles::kStages> feat{barriers.feat};
    Tile tile = params.schedule.tile(begin);
    for (int left = tiles; left > 0; tile = params.schedule.next_group(tile)) {
      float out[kRowTiles][P] = {};  // of 64 rows: the sums of both terms
      rows.wait_full();
      const int segment = params.schedule.segment(tile, left);
      left -= segment;
      const int beyond = params.mirrored == nullptr ? tile.column + segment : params.schedule.first_column(tile.group + 1);
      for (int column = tile.column; column < tile.column + segment; ++column) {
        uint32_t a[kRowTiles][kSteps][4];
        affinities(a, shared, feat, warpgroup);
        terms.wait_full();
        direct_sums(out, a, shared + Tiles::kTermColumns + terms.index * Tiles::kTermBytes);
        terms.stage().release();
        terms.advance();
        if (column >= beyond) {
          float back[P];
          mirrored_sums(back, a, shared, warpgroup);
          store_mirrored(params, tile, column, back, warpgroup);
        }
      }
      rows.stage().release();
      rows.advance();
      const int64_t slot = arch::block_index().x + params.schedule.ordinal(tile.image, tile.group);
      store_direct(params.direct + slot * P * Tiles::kRows, out, warpgroup);
    }
  }

  // A = relu(F_iᵀF_j) of this warpgroup's rows, as left factors of wgmma.
  ERCN_DEVICE static void affinities(
      uint32_t (&a)[kRowTiles][kSteps][4], unsigned char* shared, Ring<Tiles::kStages>& feat, int warpgroup) {
    float t[kRowTiles][kPixels / 2];
    Ring<Tiles::kStages> used = feat;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      feat.wait_full();
      const arch::Operand columns = arch::operand_k(shared + Tiles::kFeatColumns + feat.index * Tiles::kChunkBytes);
      arch::wgmma_fence();
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const arch::Operand row = arch::operand_k(
            shared + Tiles::kFeatRows + (r * kChunks + k) * Tiles::kChunkBytes + warpgroup * 64 * kRowBytes);
#pragma unroll
        for (int s = 0; s < kChunk / 16; ++s) {
          arch::wgmma<Element, kPixels, arch::Major::kK, arch::Major::kK>(
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
      float (&out)[kRowTiles][P], const uint32_t (&a)[kRowTiles][kSteps][4], const unsigned char* terms) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) arch::pin(out[r]);
    arch::wgmma_fence();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        arch::wgmma<Element, kTerms, arch::Major::kK>(out[r], a[r][s], term_step(terms, s), true);
      }
    }
    arch::wgmma_commit();
    arch::wgmma_wait<0>();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) arch::pin(out[r]);
  }

  // The right factor: pixels 16 s … 16 s + 15 of a tile of terms.
  ERCN_DEVICE static arch::Operand term_step(const unsigned char* terms, int s) {
    return arch::advance(arch::operand_k(terms), s / 4 * kTerms * kRowBytes + s % 4 * kStepColumns);
  }

  // back_j = Σ A_ij V_iᵀ over the group's rows, for this warpgroup's 64 columns.
  ERCN_DEVICE static void mirrored_sums(
      float (&back)[P], const uint32_t (&a)[kRowTiles][kSteps][4], unsigned char* shared, int warpgroup) {
    unsigned char* affinity = shared + Tiles::kAffinity;  // [columns / 64][rows, 64 columns]
    const int lane = arch::lane_index(), row = warpgroup * 64 + arch::warp_index() % 4 * 16 + lane % 16;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      arch::named_barrier(1, kConsumers * kWarpgroup);  // both warpgroups have read the row tile before
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int unit = s % 4 * 2 + lane / 16;  // of 16 bytes in the row
        arch::stmatrix(affinity + s / 4 * kPixels * kRowBytes + row * kRowBytes + (unit ^ row % 8) * 16, a[r][s]);
      }
      arch::fence_proxy_async();
      arch::named_barrier(2, kConsumers * kWarpgroup);
      const arch::Operand columns = arch::operand_mn(affinity + warpgroup * kPixels * kRowBytes, 0);
      const unsigned char* terms = shared + Tiles::kTermRows + r * Tiles::kTermBytes;
      arch::wgmma_fence();
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        arch::wgmma<Element, kTerms, arch::Major::kMN, arch::Major::kK>(
            back, arch::advance(columns, s * kStepRows), term_step(terms, s), r + s > 0);
      }
      arch::wgmma_commit();
      arch::wgmma_wait<0>();
      arch::pin(back);
    }
  }

  ERCN_DEVICE static void store_mirrored(
      const Params& params, const Tile& tile, int column, const float (&back)[P], int warpgroup) {
    const int64_t at = mirrored_offset(
        params.schedule, params.width, Tiles::kRows, params.channels, tile.group, tile.image, 0,
        column * static_cast<int64_t>(kPixels));
    store_sums(params.mirrored + at, params.width, params.channels, back, warpgroup * 64);
  }

  ERCN_DEVICE static void store_direct(float* direct, const float (&out)[kRowTiles][P], int warpgroup) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) store_sums(direct, Tiles::kRows, P, out[r], r * kPixels + warpgroup * 64);
  }

  // Accumulators of 64 pixels from `first` on -> to[channel][pixel], both terms added.
  ERCN_DEVICE static void store_sums(float* to, int64_t stride, int channels, const float (&sums)[P], int first) {
    const int lane = arch::lane_index(), pixel = first + arch::warp_index() % 4 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < P / 2; ++i) {
      const int channel = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (channel < channels) to[channel * stride + pixel + i / 2 % 2 * 8] = sums[i] + sums[i + P / 2];
    }
  }
};

}  // namespace ercn::sm90::affinity
