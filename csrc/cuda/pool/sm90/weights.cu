// Gradients of V and U on Hopper: dPᵀ h over the segments of a chunk, in parts of the sum that are added later.
#include <arch/convert.h>
#include <arch/launch.h>

#include "pool/sm90/epilogue.h"
#include "pool/sm90/gemm.h"
#include "pool/sm90/kernels.h"

namespace ercn::sm90 {
namespace {

template <typename Element, bool CHANNELS_FIRST>
struct PoolWeights {
  using Params = WeightsParams;
  static constexpr int kThreads = kProductThreads, kMinBlocks = 1;

  // A block's outputs and slots.
  struct Item {
    int unit, d, split;
    Range slots;
  };
  ERCN_DEVICE static Item item(const Params& p) {
    const int across = arch::divide_up(p.problem.D, kGemmColumns), block = arch::block_index().x % p.shares.blocks;
    const int split = arch::block_index().x / p.shares.blocks;
    const Range share = share_of(p.last_slot - p.first_slot, p.shares.splits, split);
    return {
        p.shares.first_unit + block / across * kWarpgroups * kDepth, block % across * kGemmColumns, split,
        {p.first_slot + share.begin, p.first_slot + share.end}};
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
      arch::lower_registers<kLoadRegisters>();
      if (warp == 0 && arch::elect_one()) load(p, shared);
    } else {
      arch::raise_registers<kMultiplyRegisters>();
      multiply(p, warpgroup - 1, shared);
    }
  }

  ERCN_DEVICE static void load(const Params& p, GemmShared& shared) {
    const Item at = item(p);
    const Bags& bags = p.problem.bags;
    Ring<kGemmStages> ring{shared.stages};
    for (int64_t slot = at.slots.begin; slot < at.slots.end; ++slot) {
      if (real_rows(p, slot) == 0) continue;
      const Box box = box_of(bags, segment_at(bags, slot));
      const int row = static_cast<int>(slot - p.first_slot) * kSegmentRows;
      GemmShared::Tiles& tiles = shared.tiles[ring.index];
      ring.load(sizeof tiles, [&](arch::Barrier* full) {
        for (int own = 0; own < kWarpgroups; ++own) {
          arch::tma_load(tiles.a[own], p.branch_grads, full, at.unit + own * kDepth, row);
        }
        for (int c = 0; c < kGemmColumns / kDepth; ++c) {
          load_slab<CHANNELS_FIRST>(tiles.b[c], p.h, full, box, at.d + c * kDepth);
        }
      });
    }
  }

  ERCN_DEVICE static void multiply(const Params& p, int own, GemmShared& shared) {
    const Item at = item(p);
    GemmMultiplier<Element, Major::kMN, CHANNELS_FIRST ? Major::kK : Major::kMN> multiplier(shared, own);
    float sums[kGemmSums];
    bool any = false;
    for (int64_t slot = at.slots.begin; slot < at.slots.end; ++slot) {
      const uint64_t real = real_rows(p, slot);
      if (real == 0) continue;
      GemmShared::Tiles& tiles = multiplier.wait();
      if (real != ~uint64_t{0}) {
        clear(tiles, real);
        arch::fence_proxy_async();
        arch::named_barrier(1, kWarpgroups * 128);
      }
      multiplier.multiply(sums, any);
      any = true;
    }
    multiplier.finish(sums);
    store(p, at, own, any, sums);
  }

  // 0 · NaN is NaN: what h holds in rows that are not real must not meet their dP of 0.
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

  ERCN_DEVICE static void store(const Params& p, const Item& at, int own, bool any, const float (&sums)[kGemmSums]) {
    const Place place;
    const int D = p.problem.D, unit = at.unit + own * kDepth - p.shares.first_unit;
    if (unit >= p.shares.units) return;
    const float unscale = !any ? 0 : p.scale == nullptr ? 1 : p.scale[1];
    const bool odd = place.lane & 1;
    float* rows = p.parts + (int64_t{at.split} * p.shares.units + unit) * D + at.d;
    // Lanes exchange halves of two 8-column blocks for four columns of one: 16 bytes. What is there is read before any
    // write.
    constexpr int kAtOnce = 8;
#pragma unroll
    for (int first = 0; first < kGemmColumns / 8; first += kAtOnce) {
      if (at.d + 8 * first >= D) break;
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
        return rows + int64_t{place.row(i % 2)} * D + 8 * (first + i / 2 * 2 + odd) + place.lane % 4 / 2 * 4;
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

void pool_weights(const WeightsParams& p, const arch::Stream& stream) {
  launch<PoolWeights>(p, p.shares.blocks * p.shares.splits, sizeof(GemmShared), stream);
}

}  // namespace ercn::sm90
