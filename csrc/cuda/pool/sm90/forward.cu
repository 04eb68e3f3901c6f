// The forward on Hopper: scores of a segment, their softmax, and Σ e·h from the tile in shared memory; or scores alone.
#include <arch/launch.h>

#include "pool/activations.h"
#include "pool/softmax.h"
#include "pool/sm90/epilogue.h"
#include "pool/sm90/kernels.h"

namespace ercn::sm90 {
namespace {

template <typename Element, bool CHANNELS_FIRST>
struct PoolForward {
  using Params = ForwardParams;
  static constexpr int kThreads = kBlockThreads, kMinBlocks = 1;

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    ProjectionShared& shared = *reinterpret_cast<ProjectionShared*>(memory);
    const int slabs = arch::divide_up(p.problem.D, kDepth), groups = arch::divide_up(p.problem.L, kUnits);
    const Scheduler scheduler{p.problem.bags, 0, slot_count(p.problem.bags)};
    initialize(shared);
    const int warpgroup = arch::uniform_warp_index() / 4;
    if (warpgroup == 0) {
      arch::lower_registers<kProducerRegisters>();
      produce<CHANNELS_FIRST>(p.maps, scheduler, slabs, groups, groups + pools(p), shared);
    } else {
      arch::raise_registers<kConsumerRegisters>();
      consume(p, scheduler, slabs, groups, warpgroup - 1, shared);
    }
  }

  ERCN_DEVICE static bool pools(const Params& p) { return p.pooled != nullptr; }

  ERCN_DEVICE static void consume(
      const Params& p, const Scheduler& scheduler, int slabs, int groups, int consumer, ProjectionShared& shared) {
    const Fragment fragment;
    ProjectionMainloop<Element, CHANNELS_FIRST> mainloop(shared, consumer, slabs, groups - 1 + pools(p));
    unsigned char* attention = shared.scratch[consumer];  // e [8 heads, 64 rows]; absent heads stay 0
    if (arch::thread_index() % 128 < 64) arch::store_16(attention + 16 * (arch::thread_index() % 128), {});
    for (int64_t pair = scheduler.begin(); pair < scheduler.end; pair += scheduler.step()) {
      if (scheduler.is_empty(pair)) continue;
      const int64_t slot = pair + consumer;
      const Segment segment = scheduler.at(slot);
      if (segment.rows == 0) {
        mainloop.skip(groups);
        continue;
      }
      float scores[2][kMaxHeads] = {};
      for (int group = 0; group < groups; ++group) {
        float sums[kSums];
        mainloop.run(group, sums);
        add_scores(p, segment, group, fragment, sums, scores);
      }
      softmax(p, slot, segment, fragment, scores, consumer, shared);
      if (pools(p)) pool(p, slot, segment, fragment, groups, consumer, mainloop, shared);
    }
  }

  // scores [2 rows, K] += w · (act(v + b_V) ⊙ σ(u + b_U)) over this thread's hidden units of a group.
  ERCN_DEVICE static void add_scores(
      const Params& p, const Segment& segment, int group, const Fragment& fragment, float (&sums)[kSums],
      float (&scores)[2][kMaxHeads]) {
    const int first = group * kUnits, units = p.problem.L - first;
    constexpr int kBlocks = kUnits / 8;
    if (p.problem.dropout.seed != nullptr) drop(p.problem, segment, first, fragment, sums);
    pool::with_activation(p.problem.activation, [&](auto activation) {
      constexpr pool::Activation A = decltype(activation)::value;
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        if (8 * j >= units) break;
        const Pair v = load_pair<Element>(p.problem.weights.v_bias, first + fragment.column(j));
        const Pair u = load_pair<Element>(p.problem.weights.u_bias, first + fragment.column(j));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[4 * j + i] = pool::gated<A>(sums[4 * j + i] + v.x[i % 2], sums[kGate + 4 * j + i] + u.x[i % 2]);
        }
      }
    });
#pragma unroll
    for (int k = 0; k < kMaxHeads; ++k) {
      if (k >= p.problem.K) break;
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        if (8 * j >= units) break;
        const Pair w = load_pair<Element>(p.problem.weights.w, int64_t{k} * p.problem.L + first + fragment.column(j));
        for (int r = 0; r < 2; ++r) {
          scores[r][k] += sums[4 * j + 2 * r] * w.x[0];
          scores[r][k] += sums[4 * j + 2 * r + 1] * w.x[1];
        }
      }
    }
  }

  // Stores the scores and, to pool, the largest one, Σ e, and e for the pooled sum. Numerator and denominator have the
  // same rounded e.
  ERCN_DEVICE static void softmax(
      const Params& p, int64_t slot, const Segment& segment, const Fragment& fragment, float (&scores)[2][kMaxHeads],
      int consumer, ProjectionShared& shared) {
    const int K = p.problem.K, quarter = fragment.lane % 4;
    float (&exchange)[4][kMaxHeads] = shared.exchange[consumer];
    const bool real[2] = {
        pool::is_real(p.problem.mask, segment, fragment.row(0)),
        pool::is_real(p.problem.mask, segment, fragment.row(1))};
#pragma unroll
    for (int k = 0; k < kMaxHeads; ++k) {
      if (k >= K) break;
      const Element* w_bias = static_cast<const Element*>(p.problem.weights.w_bias);
      const float bias = w_bias == nullptr ? 0 : arch::to_float(w_bias[k]);
      float* to = p.scores + score_offset(p.problem.bags, segment, k, K);
      for (int r = 0; r < 2; ++r) {
        float& s = scores[r][k];
        s += arch::shuffle_xor(s, 1);
        s += arch::shuffle_xor(s, 2);
        s = real[r] ? s * p.problem.dropout.scale + bias : -INFINITY;
        if (quarter == k % 4 && fragment.row(r) < segment.rows) to[fragment.row(r)] = s;
      }
      float largest = fmaxf(scores[0][k], scores[1][k]);
      for (int mask = 4; mask < 32; mask *= 2) largest = fmaxf(largest, arch::shuffle_xor(largest, mask));
      if (fragment.lane == 0) exchange[fragment.warp][k] = largest;
    }
    if (!pools(p)) return;
    sync_warpgroup(consumer);
    float sums[kMaxHeads];
#pragma unroll
    for (int k = 0; k < kMaxHeads; ++k) {
      if (k >= K) break;
      float largest = exchange[0][k];
      for (int warp = 1; warp < 4; ++warp) largest = fmaxf(largest, exchange[warp][k]);
      if (fragment.warp == 0 && fragment.lane == 0) p.softmax.largest[slot * K + k] = largest;
      largest = pool::shift_of(largest);
      sums[k] = 0;
      for (int r = 0; r < 2; ++r) {
        const Element e = arch::from_float<Element>(pool::exp_fast(scores[r][k] - largest));
        sums[k] += arch::to_float(e);
        if (quarter == k % 4) {
          *reinterpret_cast<Element*>(shared.scratch[consumer] + swizzled(k, 2 * fragment.row(r))) = e;
        }
      }
      for (int mask = 4; mask < 32; mask *= 2) sums[k] += arch::shuffle_xor(sums[k], mask);
    }
    arch::fence_proxy_async();
    sync_warpgroup(consumer);  // all have read the maxima
#pragma unroll
    for (int k = 0; k < kMaxHeads; ++k) {
      if (k < K && fragment.lane == 0) exchange[fragment.warp][k] = sums[k];
    }
    sync_warpgroup(consumer);
    const int k = arch::thread_index() % 128;
    if (k < K) p.softmax.sum[slot * K + k] = (exchange[0][k] + exchange[1][k]) + (exchange[2][k] + exchange[3][k]);
    sync_warpgroup(consumer);  // the next segment's maxima go to the same place
  }

  // Σ e·h of the segment: hᵀ [64 channels, 64 rows] · e [64 rows, 8 heads], slab by slab.
  ERCN_DEVICE static void pool(
      const Params& p, int64_t slot, const Segment& segment, const Fragment& fragment, int pass, int consumer,
      ProjectionMainloop<Element, CHANNELS_FIRST>& mainloop, ProjectionShared& shared) {
    constexpr Major kRows = CHANNELS_FIRST ? Major::kK : Major::kMN;
    const int K = p.problem.K, slabs = arch::divide_up(p.problem.D, kDepth);
    const bool whole = segment.rows == kSegmentRows && p.problem.mask.data == nullptr;
    const bool clears = !whole && !pool::is_real(p.problem.mask, segment, arch::thread_index() % 128 / 2);
    const arch::Operand e = operand<Major::kK>(shared.scratch[consumer]);
    for (int i = 0; i < slabs; ++i) {
      const int at = mainloop.wait_rows(pass, i);
      if (!whole) {
        if (clears) clear_row(shared.rows[consumer][at], arch::thread_index() % 128 / 2, arch::thread_index() % 2);
        arch::fence_proxy_async();
        sync_warpgroup(consumer);
      }
      const arch::Operand rows = operand<kRows>(shared.rows[consumer][at]);
      float z[4];
      arch::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kSegmentRows / 16; ++k) {
        arch::wgmma<Element, kMaxHeads, kRows, Major::kK>(
            z, arch::advance(rows, k * kStep<kRows>), arch::advance(e, k * kStep<Major::kK>), k > 0);
      }
      arch::wgmma_commit();
      arch::wgmma_wait<0>();
      arch::pin(z);
      mainloop.release_rows(pass, i, at);
      const int d = slab_at(slabs, pass, i) * kDepth;
      for (int c = 0; c < 2; ++c) {
        const int k = fragment.column(0) + c;
        if (k >= K) continue;
        float* to = p.pooled + (slot * K + k) * pool::pooled_width(p.problem.D) + d;
        for (int r = 0; r < 2; ++r) to[fragment.row(r)] = z[2 * r + c];
      }
    }
  }

  // Half of a row becomes 0, because 0 · NaN is NaN: h of a row that is not real is multiplied by e = 0.
  ERCN_DEVICE static void clear_row(unsigned char* slab, int row, int half) {
    if (CHANNELS_FIRST) {
      for (int d = 32 * half; d < 32 * half + 32; ++d) {
        *reinterpret_cast<Element*>(slab + swizzled(d, 2 * row)) = {};
      }
    } else {
      for (int i = 0; i < 4; ++i) arch::store_16(slab + swizzled(row, 64 * half + 16 * i), {});
    }
  }
};

}  // namespace

void pool_forward(const ForwardParams& p, const arch::Stream& stream) {
  launch_pairs<PoolForward>(p, slot_count(p.problem.bags), sizeof(ProjectionShared), stream);
}

}  // namespace ercn::sm90
