#include "pool/reduce.h"
#include "pool/softmax.h"
#include "pool/steps.h"

namespace ercn::pool {
namespace {

// One block: kSlots segments, a thread for each row.
struct ScoreGradientKernel {
  using Params = ScoreGradientParams;
  static constexpr int kSlots = 4, kThreads = kSlots * kSegmentRows, kMinBlocks = 1, kWarps = kSegmentRows / 32;
  struct Shared {
    float sums[kSlots][kWarps];
  };

  ERCN_DEVICE static void run(const Params& of, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Problem& p = of.problem;
    const int own = arch::thread_index() / kSegmentRows, i = arch::thread_index() % kSegmentRows, warp = i / 32;
    const int64_t slot = int64_t{arch::block_index().x} * kSlots + own;
    const bool exists = slot < slot_count(p.bags);
    const Segment segment = segment_at(p.bags, slot);
    const bool real = is_real(p, segment, i);
    const uint32_t bits = arch::ballot(real);
    if (exists && i % 32 == 0) of.real[slot * kWarps + warp] = bits;

    float largest = 0;
    for (int k = 0; k < p.K; ++k) {
      float ds = 0;
      if (i < segment.rows) {
        const int64_t at = score_offset(p.bags, segment, k, p.K) + i;
        if (of.attention != nullptr) {
          const int64_t bag = segment.bag * p.K + k;
          const float a = real ? exp_fast(of.scores[at] - of.bags.largest[bag]) / of.bags.sum[bag] : 0;
          if (real) ds = a * (of.grad[at] - of.bags.mean[bag]);
          of.attention[at] = a;
        }
        if (real && of.grad_scores != nullptr) {
          const int64_t b = p.bags.cu_seqlens == nullptr ? segment.bag : 0;
          const int64_t n = p.bags.cu_seqlens == nullptr ? segment.in_bag : segment.first;
          ds += of.grad_scores[b * of.grad_b + k * of.grad_k + (n + i) * of.grad_n];
        }
        of.grad[at] = ds;
      }
      largest = fmaxf(largest, fabsf(ds));
      const float sum = reduce_warp<Add>(ds);
      if (i % 32 == 0) shared.sums[own][warp] = sum;
      arch::sync_threads();
      if (exists && i == 0) of.parts[slot * p.K + k] = shared.sums[own][0] + shared.sums[own][1];
      arch::sync_threads();
    }
    if (of.largest == nullptr) return;
    largest = reduce_warp<Max>(largest);
    if (i % 32 == 0) shared.sums[own][warp] = largest;
    arch::sync_threads();
    if (exists && i == 0) of.largest[slot] = fmaxf(shared.sums[own][0], shared.sums[own][1]);
  }
};

}  // namespace

void score_gradient(const ScoreGradientParams& p, const arch::Stream& stream) {
  const int64_t blocks = arch::divide_up<int64_t>(slot_count(p.problem.bags), ScoreGradientKernel::kSlots);
  arch::launch<ScoreGradientKernel>(p, {static_cast<int>(blocks)}, sizeof(ScoreGradientKernel::Shared), stream);
}

}  // namespace ercn::pool
