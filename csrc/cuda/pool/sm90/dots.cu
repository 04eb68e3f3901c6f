// q = ĝ·h on Hopper, and the largest score, Σ e and Σ e·q of each segment: the backward's first pass over h.
#include <arch/launch.h>

#include "pool/softmax.h"
#include "pool/sm90/epilogue.h"
#include "pool/sm90/kernels.h"

namespace ercn::sm90 {
namespace {

// ĝ of each consumer's bag follows: a tile [8 heads, 64 channels] for each slab.
struct DotsShared {
  unsigned char rows[kConsumers][kRowSlabs][kSlabBytes];
  float exchange[kConsumers][3][4][kMaxHeads];
  Stage row_stages[kConsumers][kRowSlabs];
};
constexpr int kGradAt = arch::round_up<int>(sizeof(DotsShared), 1024), kGradBytes = 1024;

constexpr int shared_bytes(int slabs) { return kGradAt + kConsumers * slabs * kGradBytes; }
static_assert(shared_bytes(kMaxSlabs) <= 227 << 10);

template <typename Element, bool CHANNELS_FIRST>
struct PoolDots {
  using Params = DotsParams;
  static constexpr int kThreads = kBlockThreads, kMinBlocks = 1;

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    DotsShared& shared = *reinterpret_cast<DotsShared*>(memory);
    const int slabs = arch::divide_up(p.problem.D, kDepth);
    const Scheduler scheduler{p.problem.bags, 0, slot_count(p.problem.bags)};
    init_stages([&] { init_row_stages(shared); });
    const int warp = arch::uniform_warp_index(), warpgroup = warp / 4;
    if (warpgroup == 0) {
      if (warp >= kConsumers || !arch::elect_one()) return;
      produce_rows<CHANNELS_FIRST>(p.h_map, scheduler, slabs, 1, warp, shared);
    } else {
      const int consumer = warpgroup - 1;
      consume(p, scheduler, slabs, consumer, memory + kGradAt + consumer * slabs * kGradBytes, shared);
    }
  }

  ERCN_DEVICE static void consume(
      const Params& p, const Scheduler& scheduler, int slabs, int consumer, unsigned char* grad, DotsShared& shared) {
    constexpr Major kRows = CHANNELS_FIRST ? Major::kMN : Major::kK;
    const Fragment fragment;
    Stage* const stages = shared.row_stages[consumer];
    Phases full{0};
    int64_t bag = -1;
    for (int64_t slot = scheduler.begin() + consumer; slot < scheduler.end; slot += scheduler.step()) {
      const Segment segment = scheduler.at(slot);
      if (segment.rows == 0) continue;
      if (segment.bag != bag) {
        bag = segment.bag;
        load_grad(p, bag, slabs, grad);
        arch::fence_proxy_async();
        sync_warpgroup(consumer);
      }
      float q[4];
      for (int i = 0; i < slabs; ++i) {
        const int at = i % kRowSlabs;
        full.wait(stages[at].full, at);
        const arch::Operand rows = operand<kRows>(shared.rows[consumer][at]);
        const arch::Operand g = operand<Major::kK>(grad + i * kGradBytes);
        arch::pin(q);
        arch::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
          arch::wgmma<Element, kMaxHeads, kRows, Major::kK>(
              q, arch::advance(rows, k * kStep<kRows>), arch::advance(g, k * kStep<Major::kK>), i + k > 0);
        }
        arch::wgmma_commit();
        arch::wgmma_wait<1>();
        if (i > 0) stages[(i - 1) % kRowSlabs].release();
      }
      arch::wgmma_wait<0>();
      arch::pin(q);
      stages[(slabs - 1) % kRowSlabs].release();
      statistics(p, slot, segment, fragment, q, consumer, shared.exchange[consumer]);
    }
  }

  // By a warpgroup.
  ERCN_DEVICE static void load_grad(const Params& p, int64_t bag, int slabs, unsigned char* grad) {
    const int K = p.problem.K;
    for (int i = arch::thread_index() % 128; i < slabs * kGradBytes / 16; i += 128) {
      const int slab = i / 64, k = i / 8 % 8, column = i % 8;
      arch::Vector16 eight = {};
      if (k < K) {
        const Element* from = static_cast<const Element*>(p.grad_pooled) + (bag * K + k) * p.problem.D;
        eight = arch::load_16(from + slab * kDepth + 8 * column);
      }
      arch::store_16(grad + slab * kGradBytes + swizzled(k, 16 * column), eight);
    }
  }

  // q [64 rows, 8 heads] in wgmma's layout: a thread has two rows of two heads.
  ERCN_DEVICE static void statistics(
      const Params& p, int64_t slot, const Segment& segment, const Fragment& fragment, const float (&q)[4],
      int consumer, float (&exchange)[3][4][kMaxHeads]) {
    const int K = p.problem.K, first = fragment.column(0);
    float s[4], largest[2];
    bool real[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int k = first + c;
      const int64_t at = score_offset(p.problem.bags, segment, k, K);
      for (int r = 0; r < 2; ++r) {
        const int row = fragment.row(r);
        real[r] = pool::is_real(p.problem.mask, segment, row);
        const bool held = real[r] && k < K;
        s[2 * r + c] = held ? p.scores[at + row] : -INFINITY;
        if (row < segment.rows && k < K) p.dots[at + row] = real[r] ? q[2 * r + c] : 0;
      }
      largest[c] = fmaxf(s[c], s[2 + c]);
      for (int mask = 4; mask < 32; mask *= 2) largest[c] = fmaxf(largest[c], arch::shuffle_xor(largest[c], mask));
      if (fragment.lane < 4) exchange[0][fragment.warp][k] = largest[c];
    }
    sync_warpgroup(consumer);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int k = first + c;
      for (int warp = 0; warp < 4; ++warp) largest[c] = fmaxf(largest[c], exchange[0][warp][k]);
      const float shift = pool::shift_of(largest[c]);
      float sum = 0, weighted = 0;
      for (int r = 0; r < 2; ++r) {
        const float e = pool::exp_fast(s[2 * r + c] - shift);
        sum += e;
        weighted += real[r] ? e * q[2 * r + c] : 0;
      }
      for (int mask = 4; mask < 32; mask *= 2) {
        sum += arch::shuffle_xor(sum, mask);
        weighted += arch::shuffle_xor(weighted, mask);
      }
      if (fragment.lane < 4) exchange[1][fragment.warp][k] = sum, exchange[2][fragment.warp][k] = weighted;
      if (fragment.warp == 0 && fragment.lane < 4 && k < K) p.softmax.largest[slot * K + k] = largest[c];
    }
    sync_warpgroup(consumer);
    if (const int k = arch::thread_index() % 128; k < K) {
      const auto add = [&](const float (&x)[4][kMaxHeads]) { return (x[0][k] + x[1][k]) + (x[2][k] + x[3][k]); };
      p.softmax.sum[slot * K + k] = add(exchange[1]);
      p.weighted[slot * K + k] = add(exchange[2]);
    }
    sync_warpgroup(consumer);
  }
};

}  // namespace

void pool_dots(const DotsParams& p, const arch::Stream& stream) {
  const int slabs = arch::divide_up(p.problem.D, kDepth);
  launch_pairs<PoolDots>(p, slot_count(p.problem.bags), shared_bytes(slabs), stream);
}

}  // namespace ercn::sm90
