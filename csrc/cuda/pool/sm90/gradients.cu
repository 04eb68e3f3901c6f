// The gradients that are products with dP, on Hopper.
#include <arch/convert.h>
#include <arch/launch.h>

#include "pool/sm90/epilogue.h"
#include "pool/sm90/gemm.h"
#include "pool/sm90/kernels.h"

namespace ercn::sm90 {
namespace {

// grad_h = dt V + dσ U + aᵀ ĝ
template <typename Element>
struct PoolRowGradient {
  using Params = RowGradientParams;
  static constexpr int kThreads = kBlockThreads, kMinBlocks = 1;

  // A pair of slots and a block of channels; a pair's blocks follow each other, so its dP is read from the L2 cache.
  struct WorkTile {
    int64_t slot;
    int d;
  };
  ERCN_HOST_DEVICE static int64_t tile_count(const Params& p) {
    const int64_t pairs = arch::divide_up<int64_t>(p.dp.last_slot - p.dp.first_slot, kConsumers);
    return pairs * arch::divide_up(p.problem.D, kGemmColumns);
  }
  ERCN_DEVICE static WorkTile tile_at(const Params& p, int64_t i) {
    const int blocks = arch::divide_up(p.problem.D, kGemmColumns);
    return {p.dp.first_slot + i / blocks * kConsumers, static_cast<int>(i % blocks) * kGemmColumns};
  }

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    GemmShared& shared = *reinterpret_cast<GemmShared*>(memory);
    const Scheduler scheduler{p.problem.bags, p.dp.first_slot, p.dp.last_slot};
    initialize(shared);
    const int warp = arch::uniform_warp_index(), warpgroup = warp / 4;
    if (warpgroup == 0) {
      arch::lower_registers<kProducerRegisters>();
      if (warp == 0 && arch::elect_one()) produce(p, scheduler, shared);
    } else {
      arch::raise_registers<kConsumerRegisters>();
      consume(p, scheduler, warpgroup - 1, shared);
    }
  }

  ERCN_DEVICE static void produce(const Params& p, const Scheduler& scheduler, GemmShared& shared) {
    Ring<kGemmStages> ring{shared.stages};
    for (int64_t i = arch::block_index().x; i < tile_count(p); i += arch::grid_blocks().x) {
      const WorkTile tile = tile_at(p, i);
      if (scheduler.is_empty(tile.slot)) continue;
      const int row = static_cast<int>(tile.slot - p.dp.first_slot) * kSegmentRows;
      for (int unit = 0; unit < 2 * p.problem.L; unit += kDepth) {
        const bool gate = unit >= p.problem.L;
        GemmShared::Tiles& tiles = shared.tiles[ring.index];
        ring.load(sizeof tiles, [&](arch::Barrier* full) {
          for (int consumer = 0; consumer < kConsumers; ++consumer) {
            arch::tma_load(tiles.a[consumer], p.dp_map, full, unit, row + consumer * kSegmentRows);
          }
          for (int c = 0; c < kGemmColumns / kDepth; ++c) {
            const int first = gate ? unit - p.problem.L : unit;
            arch::tma_load(tiles.b[c], gate ? p.u_map : p.v_map, full, tile.d + c * kDepth, first);
          }
        });
      }
    }
  }

  ERCN_DEVICE static void consume(const Params& p, const Scheduler& scheduler, int consumer, GemmShared& shared) {
    const Fragment fragment;
    GemmMainloop<Element, Major::kK, Major::kMN> mainloop(shared, consumer);
    const int steps = 2 * p.problem.L / kDepth;
    for (int64_t i = arch::block_index().x; i < tile_count(p); i += arch::grid_blocks().x) {
      const WorkTile tile = tile_at(p, i);
      if (scheduler.is_empty(tile.slot)) continue;
      const Segment segment = scheduler.at(tile.slot + consumer);
      if (segment.rows == 0) {
        mainloop.skip(steps);
        continue;
      }
      float sums[kGemmSums];
      for (int step = 0; step < steps; ++step) {
        mainloop.wait();
        mainloop.step(sums, step > 0);
      }
      mainloop.finish(sums);
      store(p, segment, tile.d, fragment, sums);
    }
  }

  ERCN_DEVICE static void store(
      const Params& p, const Segment& segment, int first, const Fragment& fragment, const float (&sums)[kGemmSums]) {
    const int K = p.problem.K, D = p.problem.D;
    const float unscale = p.dp.scale == nullptr ? 1 : p.dp.scale[1];
    const bool real[2] = {
        pool::is_real(p.problem.mask, segment, fragment.row(0)),
        pool::is_real(p.problem.mask, segment, fragment.row(1))};
    float a[kMaxHeads][2] = {};
#pragma unroll
    for (int k = 0; k < kMaxHeads; ++k) {
      if (p.attention == nullptr || k >= K) break;
      const float* from = p.attention + score_offset(p.problem.bags, segment, k, K);
      for (int r = 0; r < 2; ++r) a[k][r] = real[r] ? from[fragment.row(r)] : 0;
    }
    const int heads = p.attention == nullptr ? 0 : K;
#pragma unroll
    for (int j = 0; j < kGemmColumns / 8; j += 4) {
      if (first + 8 * j >= D) break;
      uint32_t words[2][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int d = first + fragment.column(j + m);
        float x[4];
        for (int i = 0; i < 4; ++i) x[i] = unscale * sums[4 * (j + m) + i];
#pragma unroll
        for (int k = 0; k < kMaxHeads; ++k) {
          if (k >= heads) break;
          const Pair g = load_pair<Element>(p.grad_pooled, (segment.bag * K + k) * D + d);
          for (int i = 0; i < 4; ++i) x[i] += a[k][i / 2] * g.x[i % 2];
        }
        for (int r = 0; r < 2; ++r) words[r][m] = real[r] ? arch::pack<Element>(x[2 * r], x[2 * r + 1]) : 0;
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        transpose_quad(words[r], fragment.lane);
        if (fragment.row(r) >= segment.rows) continue;
        Element* to = static_cast<Element*>(p.grad_h) + (segment.first + fragment.row(r)) * D + first;
        arch::store_16(to + 8 * (j + fragment.lane % 4), {{words[r][0], words[r][1], words[r][2], words[r][3]}});
      }
    }
  }
};

// dPᵀ h over the segments of a chunk, in splits of the sum that are added later.
template <typename Element, bool CHANNELS_FIRST>
struct PoolWeightGradient {
  using Params = WeightGradientParams;
  static constexpr int kThreads = kBlockThreads, kMinBlocks = 1;

  // The outputs and the slots of a block.
  struct WorkTile {
    int unit, d, split;
    Range slots;
  };
  ERCN_DEVICE static WorkTile tile_at(const Params& p) {
    const int across = arch::divide_up(p.problem.D, kGemmColumns), block = arch::block_index().x % p.tiling.tiles;
    const int split = arch::block_index().x / p.tiling.tiles;
    const Range slots = split_range(p.dp.last_slot - p.dp.first_slot, p.tiling.splits, split);
    return {
        p.tiling.first_unit + block / across * kConsumers * kDepth,
        block % across * kGemmColumns,
        split,
        {p.dp.first_slot + slots.begin, p.dp.first_slot + slots.end}};
  }

  // Which rows of a slot are real; those without any add nothing.
  ERCN_DEVICE static uint64_t real_rows(const Params& p, int64_t slot) {
    return p.real[2 * slot] | static_cast<uint64_t>(p.real[2 * slot + 1]) << 32;
  }

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    GemmShared& shared = *reinterpret_cast<GemmShared*>(memory);
    initialize(shared);
    const int warp = arch::uniform_warp_index(), warpgroup = warp / 4;
    if (warpgroup == 0) {
      arch::lower_registers<kProducerRegisters>();
      if (warp == 0 && arch::elect_one()) produce(p, shared);
    } else {
      arch::raise_registers<kConsumerRegisters>();
      consume(p, warpgroup - 1, shared);
    }
  }

  ERCN_DEVICE static void produce(const Params& p, GemmShared& shared) {
    const WorkTile tile = tile_at(p);
    const Bags& bags = p.problem.bags;
    Ring<kGemmStages> ring{shared.stages};
    for (int64_t slot = tile.slots.begin; slot < tile.slots.end; ++slot) {
      if (real_rows(p, slot) == 0) continue;
      const Box box = box_of(bags, segment_at(bags, slot));
      const int row = static_cast<int>(slot - p.dp.first_slot) * kSegmentRows;
      GemmShared::Tiles& tiles = shared.tiles[ring.index];
      ring.load(sizeof tiles, [&](arch::Barrier* full) {
        for (int consumer = 0; consumer < kConsumers; ++consumer) {
          arch::tma_load(tiles.a[consumer], p.dp_map, full, tile.unit + consumer * kDepth, row);
        }
        for (int c = 0; c < kGemmColumns / kDepth; ++c) {
          load_slab<CHANNELS_FIRST>(tiles.b[c], p.h_map, full, box, tile.d + c * kDepth);
        }
      });
    }
  }

  ERCN_DEVICE static void consume(const Params& p, int consumer, GemmShared& shared) {
    const WorkTile tile = tile_at(p);
    GemmMainloop<Element, Major::kMN, CHANNELS_FIRST ? Major::kK : Major::kMN> mainloop(shared, consumer);
    float sums[kGemmSums];
    bool any = false;
    for (int64_t slot = tile.slots.begin; slot < tile.slots.end; ++slot) {
      const uint64_t real = real_rows(p, slot);
      if (real == 0) continue;
      GemmShared::Tiles& tiles = mainloop.wait();
      if (real != ~uint64_t{0}) {
        clear(tiles, real);
        arch::fence_proxy_async();
        arch::named_barrier(1, kConsumers * 128);
      }
      mainloop.step(sums, any);
      any = true;
    }
    mainloop.finish(sums);
    store(p, tile, consumer, any, sums);
  }

  // 0 · NaN is NaN: clears the rows of h that are not real, because their dP is 0.
  ERCN_DEVICE static void clear(GemmShared::Tiles& tiles, uint64_t real) {
    const int thread = arch::thread_index() - 128;
    if (CHANNELS_FIRST) {
      for (int row = 0; row < kSegmentRows; ++row) {
        if (real >> row & 1) continue;
        *reinterpret_cast<Element*>(tiles.b[0] + swizzled(thread, 2 * row)) = {};
      }
    } else if (const int row = thread % kSegmentRows; (real >> row & 1) == 0) {
      for (int i = 0; i < 128; i += 16) arch::store_16(tiles.b[thread / kSegmentRows] + row * 128 + i, {});
    }
  }

  ERCN_DEVICE static void store(
      const Params& p, const WorkTile& tile, int consumer, bool any, const float (&sums)[kGemmSums]) {
    const Fragment fragment;
    const int D = p.problem.D, unit = tile.unit + consumer * kDepth - p.tiling.first_unit;
    if (unit >= p.tiling.units) return;
    const float unscale = !any ? 0 : p.dp.scale == nullptr ? 1 : p.dp.scale[1];
    const bool odd = fragment.lane & 1;
    float* rows = p.parts + (int64_t{tile.split} * p.tiling.units + unit) * D + tile.d;
    // Lanes exchange halves of two 8-column blocks for four columns of one: 16 bytes. All reads come before the writes.
    constexpr int kAtOnce = 8;
#pragma unroll
    for (int first = 0; first < kGemmColumns / 8; first += kAtOnce) {
      if (tile.d + 8 * first >= D) break;
      float x[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int j = first + i / 2 * 2, r = i % 2;
        for (int c = 0; c < 2; ++c) {
          const float low = any ? sums[4 * j + 2 * r + c] : 0, high = any ? sums[4 * (j + 1) + 2 * r + c] : 0;
          const float got = arch::shuffle_xor(odd ? low : high, 1);
          x[i][c] = unscale * (odd ? got : low);
          x[i][2 + c] = unscale * (odd ? high : got);
        }
      }
      const auto to = [&](int i) {
        return rows + int64_t{fragment.row(i % 2)} * D + 8 * (first + i / 2 * 2 + odd) + fragment.lane % 4 / 2 * 4;
      };
      arch::Vector16 sum[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum[i] = p.accumulate ? arch::load_16(to(i)) : arch::Vector16{};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        for (int c = 0; c < 4; ++c) sum[i].words[c] = arch::float_bits(arch::float_of(sum[i].words[c]) + x[i][c]);
        arch::store_16(to(i), sum[i]);
      }
    }
  }
};

}  // namespace

void pool_row_gradient(const RowGradientParams& p, const arch::Stream& stream) {
  with_half(p.problem.type, [&](auto element) {
    using Kernel = PoolRowGradient<decltype(element)>;
    const int64_t blocks = std::min<int64_t>(Kernel::tile_count(p), stream.multiprocessors());
    arch::launch<Kernel>(p, {static_cast<int>(blocks)}, sizeof(GemmShared), stream);
  });
}

void pool_weight_gradient(const WeightGradientParams& p, const arch::Stream& stream) {
  launch<PoolWeightGradient>(p, p.tiling.tiles * p.tiling.splits, sizeof(GemmShared), stream);
}

}  // namespace ercn::sm90
