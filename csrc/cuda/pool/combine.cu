// The softmax of whole bags from that of their segments.
#include "pool/combine.h"

#include <arch/convert.h>

#include "pool/reduce.h"
#include "pool/softmax.h"

namespace ercn::pool {
namespace {

using arch::Vector16;

// Largest of a bag's parts, shifted; by a whole block.
template <int THREADS>
ERCN_DEVICE float largest_of_bag(const float* largest, int64_t slot, int64_t segments, int k, int K, float* scratch) {
  float most = -INFINITY;
  for (int64_t s = arch::thread_index(); s < segments; s += THREADS) most = fmaxf(most, largest[(slot + s) * K + k]);
  return shift_of(reduce_block<Max, THREADS>(most, scratch));
}

// One block: a bag, a head and kChannels channels. Eight threads with four channels each read a part; kLanes parts at
// once.
template <typename Element>
struct Combine {
  struct Params {
    Bags bags;
    int D, K;
    Parts parts;
    Element* pooled;
  };
  static constexpr int kThreads = 256, kMinBlocks = 1, kChannels = 32, kLanes = kThreads / (kChannels / 4);
  struct Shared {
    float sums[kLanes][kChannels / 4][5];
    float scratch[kThreads / 32];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int blocks = arch::divide_up(p.D, kChannels), block = arch::block_index().x;
    const int row = block / blocks, k = row % p.K;
    const int64_t bag = row / p.K, slot = first_slot(p.bags, bag), segments = bag_segments(p.bags, bag);
    const float largest = largest_of_bag<kThreads>(p.parts.largest, slot, segments, k, p.K, shared.scratch);

    const int thread = arch::thread_index(), lane = thread / (kChannels / 4), four = thread % (kChannels / 4);
    const int d = block % blocks * kChannels + 4 * four;
    float(&z)[5] = shared.sums[lane][four];  // four channels and Σ e
    float sums[5] = {};
    for (int64_t s = lane; s < segments; s += kLanes) {
      const int64_t at = (slot + s) * p.K + k;
      const float scale = exp_fast(p.parts.largest[at] - largest);
      sums[4] += scale * p.parts.sum[at];
      if (d < p.D) {
        const Vector16 part = arch::load_16(p.parts.pooled + at * pooled_width(p.D) + d);
        for (int i = 0; i < 4; ++i) sums[i] += scale * arch::float_of(part.words[i]);
      }
    }
    for (int i = 0; i < 5; ++i) z[i] = sums[i];
    for (int half = kLanes / 2; half > 0; half /= 2) {
      arch::sync_threads();
      if (lane < half) {
        for (int i = 0; i < 5; ++i) z[i] += shared.sums[lane + half][four][i];
      }
    }
    if (lane > 0) return;
    const float sum = z[4] == 0 ? 1 : z[4];
    for (int i = 0; i < 4; ++i) {
      if (d + i < p.D) p.pooled[int64_t{row} * p.D + d + i] = arch::from_float<Element>(z[i] / sum);
    }
  }
};

// One block: a bag and a head.
struct CombineStatistics {
  struct Params {
    Bags bags;
    int K;
    const float *largest, *sum, *weighted;
    Statistics to;
  };
  static constexpr int kThreads = 128, kMinBlocks = 1;
  struct Shared {
    float scratch[kThreads / 32];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int row = arch::block_index().x, k = row % p.K;
    const int64_t bag = row / p.K, slot = first_slot(p.bags, bag), segments = bag_segments(p.bags, bag);
    const float largest = largest_of_bag<kThreads>(p.largest, slot, segments, k, p.K, shared.scratch);
    float sum = 0, weighted = 0;
    for (int64_t s = arch::thread_index(); s < segments; s += kThreads) {
      const int64_t at = (slot + s) * p.K + k;
      const float scale = exp_fast(p.largest[at] - largest);
      sum += scale * p.sum[at];
      weighted += scale * p.weighted[at];
    }
    sum = reduce_block<Add, kThreads>(sum, shared.scratch);
    weighted = reduce_block<Add, kThreads>(weighted, shared.scratch);
    if (arch::thread_index() > 0) return;
    sum = sum == 0 ? 1 : sum;
    p.to.largest[row] = largest;
    p.to.sum[row] = sum;
    p.to.mean[row] = weighted / sum;
  }
};

template <typename Element>
void combine_as(const Problem& p, const Parts& parts, void* pooled, const arch::Stream& stream) {
  using Kernel = Combine<Element>;
  const int64_t blocks = p.bags.count * p.K * arch::divide_up(p.D, Kernel::kChannels);
  arch::launch<Kernel>(
      {p.bags, p.D, p.K, parts, static_cast<Element*>(pooled)}, {static_cast<int>(blocks)},
      sizeof(typename Kernel::Shared), stream);
}

}  // namespace

void combine(const Problem& p, const Parts& parts, void* pooled, Type type, const arch::Stream& stream) {
  switch (type) {
    case Type::kFloat: return combine_as<float>(p, parts, pooled, stream);
    case Type::kBf16: return combine_as<arch::bf16>(p, parts, pooled, stream);
    case Type::kFp16: return combine_as<arch::fp16>(p, parts, pooled, stream);
  }
}

void combine_statistics(
    const Problem& p, const Parts& parts, const float* weighted, const Statistics& to, const arch::Stream& stream) {
  arch::launch<CombineStatistics>(
      {p.bags, p.K, parts.largest, parts.sum, weighted, to}, {static_cast<int>(p.bags.count * p.K)},
      sizeof(CombineStatistics::Shared), stream);
}

}  // namespace ercn::pool
