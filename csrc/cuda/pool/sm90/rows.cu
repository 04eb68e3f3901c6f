// grad_h = dt V + dσ U + aᵀ ĝ on Hopper.
#include <arch/launch.h>

#include "pool/sm90/epilogue.h"
#include "pool/sm90/gemm.h"
#include "pool/sm90/kernels.h"

namespace ercn::sm90 {
namespace {

template <typename Element>
struct PoolRows {
  using Params = RowsParams;
  static constexpr int kThreads = kProductThreads, kMinBlocks = 1;

  // Pairs of slots × blocks of channels; a pair's blocks follow each other, so its dP is read from the L2 cache.
  struct Item {
    int64_t slot;
    int d;
  };
  ERCN_HOST_DEVICE static int64_t items(const Params& p) {
    const int64_t pairs = arch::divide_up<int64_t>(p.last_slot - p.first_slot, kWarpgroups);
    return pairs * arch::divide_up(p.problem.D, kGemmColumns);
  }
  ERCN_DEVICE static Item item(const Params& p, int64_t i) {
    const int blocks = arch::divide_up(p.problem.D, kGemmColumns);
    return {p.first_slot + i / blocks * kWarpgroups, static_cast<int>(i % blocks) * kGemmColumns};
  }

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    GemmShared& shared = *reinterpret_cast<GemmShared*>(memory);
    const Work work{p.problem.bags, p.first_slot, p.last_slot};
    initialize(shared);
    const int warp = arch::uniform_warp_index(), warpgroup = warp / 4;
    if (warpgroup == 0) {
      arch::lower_registers<kLoadRegisters>();
      if (warp == 0 && arch::elect_one()) load(p, work, shared);
    } else {
      arch::raise_registers<kMultiplyRegisters>();
      multiply(p, work, warpgroup - 1, shared);
    }
  }

  ERCN_DEVICE static void load(const Params& p, const Work& work, GemmShared& shared) {
    Ring<kGemmStages> ring{shared.stages};
    for (int64_t i = arch::block_index().x; i < items(p); i += arch::grid_blocks().x) {
      const Item at = item(p, i);
      if (work.is_empty(at.slot)) continue;
      const int row = static_cast<int>(at.slot - p.first_slot) * kSegmentRows;
      for (int unit = 0; unit < 2 * p.problem.L; unit += kDepth) {
        const bool gate = unit >= p.problem.L;
        GemmShared::Tiles& tiles = shared.tiles[ring.index];
        ring.load(sizeof tiles, [&](arch::Barrier* full) {
          for (int own = 0; own < kWarpgroups; ++own) {
            arch::tma_load(tiles.a[own], p.branch_grads, full, unit, row + own * kSegmentRows);
          }
          for (int c = 0; c < kGemmColumns / kDepth; ++c) {
            arch::tma_load(tiles.b[c], gate ? p.u : p.v, full, at.d + c * kDepth, gate ? unit - p.problem.L : unit);
          }
        });
      }
    }
  }

  ERCN_DEVICE static void multiply(const Params& p, const Work& work, int own, GemmShared& shared) {
    const Place place;
    GemmMultiplier<Element, Major::kK, Major::kMN> multiplier(shared, own);
    const int steps = 2 * p.problem.L / kDepth;
    for (int64_t i = arch::block_index().x; i < items(p); i += arch::grid_blocks().x) {
      const Item at = item(p, i);
      if (work.is_empty(at.slot)) continue;
      const Segment segment = work.at(at.slot + own);
      if (segment.rows == 0) {
        multiplier.skip(steps);
        continue;
      }
      float sums[kGemmSums];
      for (int step = 0; step < steps; ++step) {
        multiplier.wait();
        multiplier.multiply(sums, step > 0);
      }
      multiplier.finish(sums);
      store(p, segment, at.d, place, sums);
    }
  }

  ERCN_DEVICE static void store(
      const Params& p, const Segment& segment, int first, const Place& place, const float (&sums)[kGemmSums]) {
    const int K = p.problem.K, D = p.problem.D;
    const float unscale = p.scale == nullptr ? 1 : p.scale[1];
    const bool real[2] = {
        pool::is_real(p.problem, segment, place.row(0)), pool::is_real(p.problem, segment, place.row(1))};
    float a[kMaxHeads][2] = {};
#pragma unroll
    for (int k = 0; k < kMaxHeads; ++k) {
      if (p.attention == nullptr || k >= K) break;
      const float* from = p.attention + score_offset(p.problem.bags, segment, k, K);
      for (int r = 0; r < 2; ++r) a[k][r] = real[r] ? from[place.row(r)] : 0;
    }
    const int heads = p.attention == nullptr ? 0 : K;
#pragma unroll
    for (int j = 0; j < kGemmColumns / 8; j += 4) {
      if (first + 8 * j >= D) break;
      uint32_t words[2][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int d = first + place.column(j + m);
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
        transpose_quad(words[r], place.lane);
        if (place.row(r) >= segment.rows) continue;
        Element* to = static_cast<Element*>(p.grad_h) + (segment.first + place.row(r)) * D + first;
        arch::store_16(to + 8 * (j + place.lane % 4), {{words[r][0], words[r][1], words[r][2], words[r][3]}});
      }
    }
  }
};

}  // namespace

void pool_rows(const RowsParams& p, const arch::Stream& stream) {
  with_half(p.problem.type, [&](auto element) {
    using Kernel = PoolRows<decltype(element)>;
    const int64_t blocks = std::min<int64_t>(Kernel::items(p), stream.multiprocessors());
    arch::launch<Kernel>(p, {static_cast<int>(blocks)}, sizeof(GemmShared), stream);
  });
}

}  // namespace ercn::sm90
