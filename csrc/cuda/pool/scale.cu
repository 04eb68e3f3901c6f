#include "pool/scale.h"

#include <arch/convert.h>

#include "pool/reduce.h"

namespace ercn::pool {
namespace {

// One block. |dP| ≤ Σ_k |ds_k| |w_k|, which is brought to 2^14 at most; small values have 38 binary orders left.
struct BranchScale {
  struct Params {
    const float* largest;
    int64_t slots;
    const arch::fp16* w;
    int64_t count;
    int heads;
    float* scale;
  };
  static constexpr int kThreads = 256, kMinBlocks = 1, kMost = 14, kRange = 100;
  struct Shared {
    float scratch[kThreads / 32];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    float ds = 0, w = 0;
    for (int64_t i = arch::thread_index(); i < p.slots; i += kThreads) ds = fmaxf(ds, p.largest[i]);
    for (int64_t i = arch::thread_index(); i < p.count; i += kThreads) w = fmaxf(w, fabsf(arch::to_float(p.w[i])));
    ds = reduce_block<Max, kThreads>(ds, shared.scratch);
    w = reduce_block<Max, kThreads>(w, shared.scratch);
    if (arch::thread_index() > 0) return;
    const float bound = p.heads * ds * w;
    int exponent = 0;
    if (bound > 0 && bound < INFINITY) {
      exponent = kMost - 1 - (static_cast<int>(arch::float_bits(bound) >> 23) - 127);
      exponent = exponent < -kRange ? -kRange : exponent > kRange ? kRange : exponent;
    }
    p.scale[0] = arch::float_of(static_cast<uint32_t>(127 + exponent) << 23);
    p.scale[1] = arch::float_of(static_cast<uint32_t>(127 - exponent) << 23);
  }
};

}  // namespace

void branch_scale(
    const float* largest, int64_t slots, const void* w, int64_t count, int heads, float* scale,
    const arch::Stream& stream) {
  const BranchScale::Params params{largest, slots, static_cast<const arch::fp16*>(w), count, heads, scale};
  arch::launch<BranchScale>(params, {1}, sizeof(BranchScale::Shared), stream);
}

}  // namespace ercn::pool
