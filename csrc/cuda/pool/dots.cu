// One block: a segment and up to kHeads heads.
#include "pool/dots.h"

#include <cmath>

#include "pool/instances.h"
#include "pool/reduce.h"
#include "pool/softmax.h"
#include "pool/streaming.h"

namespace ercn::pool {
namespace {

template <typename Element, bool CHANNELS_FIRST>
struct PoolDots {
  using Streams = Streaming<Element, CHANNELS_FIRST>;
  static constexpr int kThreads = Streams::kThreads, kMinBlocks = 2, kHeads = Streams::kHeads;
  struct Params {
    Problem problem;
    Dots of;
    bool vector;
  };
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
    if (arch::uniform_warp_index() < kSegmentRows / 32) {
      const uint32_t real = arch::ballot(is_real(problem, segment, arch::thread_index()));
      if (arch::lane_index() == 0) shared.real[arch::warp_index()] = real;
    }
    const Instances<Element> h(problem, segment, p.vector);
    const Element* grad =
        static_cast<const Element*>(p.of.grad_pooled) + (segment.bag * problem.K + first) * problem.D;
    Streams::dot_channels(h, grad, heads, shared.products);
    arch::sync_threads();
    const int k = arch::uniform_warp_index();
    if (k < heads) weigh(p, segment, slot, first + k, shared.products, k, shared.real);
  }

  // By a warp: q of head k from the warps' shares, and the parts.
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
      s[half] = is_real ? p.of.scores[at + row] : -INFINITY;
      q[half] = is_real ? Streams::total(products, k, row) : 0;
      if (row < segment.rows) p.of.products[at + row] = q[half];
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
    p.of.parts.largest[slot * p.problem.K + head] = largest;
    p.of.parts.sum[slot * p.problem.K + head] = sum;
    p.of.weighted[slot * p.problem.K + head] = weighted;
  }
};

template <typename Element, bool CHANNELS_FIRST>
void run(const Problem& problem, const Dots& of, bool vector, const arch::Stream& stream) {
  using Kernel = PoolDots<Element, CHANNELS_FIRST>;
  const arch::Grid grid{static_cast<int>(slot_count(problem.bags)), arch::divide_up(problem.K, Kernel::kHeads)};
  arch::launch<Kernel>({problem, of, vector}, grid, sizeof(typename Kernel::Shared), stream);
}

}  // namespace

template <typename Element>
void dots(const Problem& problem, const Dots& of, const arch::Stream& stream) {
  const Layout layout = layout_of(problem, sizeof(Element));
  if (layout.channels_first) {
    run<Element, true>(problem, of, layout.vector, stream);
  } else {
    run<Element, false>(problem, of, layout.vector, stream);
  }
}

template void dots<float>(const Problem&, const Dots&, const arch::Stream&);
template void dots<arch::bf16>(const Problem&, const Dots&, const arch::Stream&);
template void dots<arch::fp16>(const Problem&, const Dots&, const arch::Stream&);

}  // namespace ercn::pool
