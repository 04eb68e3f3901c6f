#include <arch/convert.h>

#include "pool/reduce.h"
#include "pool/steps.h"

namespace ercn::pool {
namespace {

// One block. |dt| ≤ Σ_k |ds_k| |w_k| (1.13 times that for GELU), which is brought to 2^14 at most; small values have 38
// binary orders left. |dσ| is a quarter of it times |act(v)|, which no size is known of but for tanh: others are brought
// to 2^6, which |act(v)| of 4095 and 30 orders are left for.
struct BranchScale {
  using Params = BranchScaleParams;
  static constexpr int kThreads = 256, kMinBlocks = 1, kRange = 100;
  struct Shared {
    float scratch[kThreads / 32];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int64_t slots = slot_count(p.problem.bags), weights = int64_t{p.problem.K} * p.problem.L;
    const arch::fp16* of_heads = static_cast<const arch::fp16*>(p.problem.w);
    float ds = 0, w = 0;
    for (int64_t i = arch::thread_index(); i < slots; i += kThreads) ds = fmaxf(ds, p.largest[i]);
    for (int64_t i = arch::thread_index(); i < weights; i += kThreads) w = fmaxf(w, fabsf(arch::to_float(of_heads[i])));
    ds = reduce_block<Max, kThreads>(ds, shared.scratch);
    w = reduce_block<Max, kThreads>(w, shared.scratch);
    if (arch::thread_index() > 0) return;
    const float bound = p.problem.dropout.scale * p.problem.K * ds * w;
    const int most = p.problem.activation == Activation::kTanh ? 14 : 6;
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

void branch_scale(const BranchScaleParams& p, const arch::Stream& stream) {
  arch::launch<BranchScale>(p, {1}, sizeof(BranchScale::Shared), stream);
}

}  // namespace ercn::pool
