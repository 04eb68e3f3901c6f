// The gradient of scores, and the scale of dP that follows from it.
#include <arch/convert.h>

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

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int in_block = arch::thread_index() / kSegmentRows, i = arch::thread_index() % kSegmentRows, warp = i / 32;
    const int64_t slot = int64_t{arch::block_index().x} * kSlots + in_block;
    const bool exists = slot < slot_count(p.bags);
    const Segment segment = segment_at(p.bags, slot);
    const bool real = is_real(p.mask, segment, i);
    const uint32_t bits = arch::ballot(real);
    if (exists && i % 32 == 0) p.real[slot * kWarps + warp] = bits;

    float largest = 0;
    for (int k = 0; k < p.K; ++k) {
      float ds = 0;
      if (i < segment.rows) {
        const int64_t at = score_offset(p.bags, segment, k, p.K) + i;
        if (p.attention != nullptr) {
          const int64_t bag = segment.bag * p.K + k;
          const float a = real ? exp_fast(p.scores[at] - p.statistics.largest[bag]) / p.statistics.sum[bag] : 0;
          if (real) ds = a * (p.grad[at] - p.statistics.mean[bag]);
          p.attention[at] = a;
        }
        if (real && p.grad_scores.data != nullptr) {
          const int64_t b = p.bags.cu_seqlens == nullptr ? segment.bag : 0;
          const int64_t n = p.bags.cu_seqlens == nullptr ? segment.in_bag : segment.first;
          const GradScores& grad = p.grad_scores;
          ds += grad.data[b * grad.stride_b + k * grad.stride_k + (n + i) * grad.stride_n];
        }
        p.grad[at] = ds;
      }
      largest = fmaxf(largest, fabsf(ds));
      const float sum = reduce_warp<Add>(ds);
      if (i % 32 == 0) shared.sums[in_block][warp] = sum;
      arch::sync_threads();
      if (exists && i == 0) p.parts[slot * p.K + k] = shared.sums[in_block][0] + shared.sums[in_block][1];
      arch::sync_threads();
    }
    if (p.largest == nullptr) return;
    largest = reduce_warp<Max>(largest);
    if (i % 32 == 0) shared.sums[in_block][warp] = largest;
    arch::sync_threads();
    if (exists && i == 0) p.largest[slot] = fmaxf(shared.sums[in_block][0], shared.sums[in_block][1]);
  }
};

// One block. |dt| ≤ Σ_k |ds_k| |w_k| (1.13 times that for GELU) is scaled to 2^14 at most, and small values keep 38
// binary orders. |dσ| is at most a quarter of it times |act(v)|, which is bounded for tanh only: with other activations
// the scale is for 2^6, which leaves room for |act(v)| up to 4095 and keeps 30 orders.
struct BranchScale {
  using Params = BranchScaleParams;
  static constexpr int kThreads = 256, kMinBlocks = 1, kRange = 100;
  struct Shared {
    float scratch[kThreads / 32];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int64_t weights = int64_t{p.K} * p.L;
    const arch::fp16* heads = static_cast<const arch::fp16*>(p.w);
    float ds = 0, w = 0;
    for (int64_t i = arch::thread_index(); i < p.slots; i += kThreads) ds = fmaxf(ds, p.largest[i]);
    for (int64_t i = arch::thread_index(); i < weights; i += kThreads) w = fmaxf(w, fabsf(arch::to_float(heads[i])));
    ds = reduce_block<Max, kThreads>(ds, shared.scratch);
    w = reduce_block<Max, kThreads>(w, shared.scratch);
    if (arch::thread_index() > 0) return;
    const float bound = p.dropout_scale * p.K * ds * w;
    const int most = p.activation == Activation::kTanh ? 14 : 6;
    int exponent = 0;
    if (bound > 0 && bound < INFINITY) {
      exponent = most - 1 - (static_cast<int>(arch::float_bits(bound) >> 23) - 127);
      exponent = exponent < -kRange ? -kRange : exponent > kRange ? kRange : exponent;
    }
    p.scale[0] = arch::float_of(static_cast<uint32_t>(127 + exponent) << 23);
    p.scale[1] = arch::float_of(static_cast<uint32_t>(127 - exponent) << 23);
  }
};

}  // namespace

void score_gradient(const ScoreGradientParams& p, const arch::Stream& stream) {
  const int64_t blocks = arch::divide_up<int64_t>(slot_count(p.bags), ScoreGradientKernel::kSlots);
  arch::launch<ScoreGradientKernel>(p, {static_cast<int>(blocks)}, sizeof(ScoreGradientKernel::Shared), stream);
}

void branch_scale(const BranchScaleParams& p, const arch::Stream& stream) {
  arch::launch<BranchScale>(p, {1}, sizeof(BranchScale::Shared), stream);
}

}  // namespace ercn::pool
