// q = ĝ·h and the statistics of each segment. One block: a segment and up to kHeads heads.
#include <cmath>

#include "pool/generic/kernels.h"
#include "pool/generic/segment_view.h"
#include "pool/generic/streaming.h"
#include "pool/softmax.h"

namespace ercn::pool {
namespace {

template <typename Element, bool CHANNELS_FIRST>
struct PoolDots {
  using Streams = Streaming<Element, CHANNELS_FIRST>;
  using Params = DotsParams;
  static constexpr int kThreads = Streams::kThreads, kMinBlocks = 2, kHeads = Streams::kHeads;
  struct Shared {
    float products[Streams::kWarps][kHeads][kSegmentRows];
    uint32_t real[kSegmentRows / 32];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Problem& problem = p.problem;
    const int64_t slot = arch::block_index().x;
    const int first = arch::block_index().y * kHeads, heads = problem.K - first < kHeads ? problem.K - first : kHeads;
    const Segment segment = segment_at(problem.bags, slot);
    if (segment.rows == 0) return;
    store_real_rows(problem.mask, segment, shared.real);
    const SegmentView<Element> h(problem, segment);
    const Element* grad = static_cast<const Element*>(p.grad_pooled) + (segment.bag * problem.K + first) * problem.D;
    Streams::dot_channels(h, grad, heads, shared.products);
    arch::sync_threads();
    const int k = arch::uniform_warp_index();
    if (k < heads) weigh(p, segment, slot, first + k, shared.products, k, shared.real);
  }

  // By a warp: q of head k from the sums of all warps, and its statistics.
  ERCN_DEVICE static void weigh(
      const Params& p, const Segment& segment, int64_t slot, int head,
      const float (&products)[Streams::kWarps][kHeads][kSegmentRows], int k,
      const uint32_t (&real)[kSegmentRows / 32]) {
    const int lane = arch::lane_index();
    const int64_t at = score_offset(p.problem.bags, segment, head, p.problem.K);
    float s[2], q[2], largest = -INFINITY, sum = 0, weighted = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 32 + lane;
      const bool is_real = real[half] >> lane & 1;
      s[half] = is_real ? p.scores[at + row] : -INFINITY;
      q[half] = is_real ? Streams::total(products, k, row) : 0;
      if (row < segment.rows) p.dots[at + row] = q[half];
      largest = fmaxf(largest, s[half]);
    }
    largest = reduce_warp<Max>(largest);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float e = exp_fast(s[half] - shift_of(largest));
      sum += e;
      weighted += e * q[half];
    }
    sum = reduce_warp<Add>(sum);
    weighted = reduce_warp<Add>(weighted);
    if (lane > 0) return;
    p.softmax.largest[slot * p.problem.K + head] = largest;
    p.softmax.sum[slot * p.problem.K + head] = sum;
    p.weighted[slot * p.problem.K + head] = weighted;
  }
};

}  // namespace

void dots(const DotsParams& p, const arch::Stream& stream) {
  const auto start = [&](auto kernel) {
    using Kernel = decltype(kernel);
    const int slots = static_cast<int>(slot_count(p.problem.bags));
    arch::launch<Kernel>(
        p, {slots, arch::divide_up(p.problem.K, Kernel::kHeads)}, sizeof(typename Kernel::Shared), stream);
  };
  with_element(p.problem.type, [&](auto element) {
    using Element = decltype(element);
    p.problem.h.channels_first ? start(PoolDots<Element, true>()) : start(PoolDots<Element, false>());
  });
}

}  // namespace ercn::pool
