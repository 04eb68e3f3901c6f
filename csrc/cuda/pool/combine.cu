// Adds partial results: the softmax of whole bags from that of their segments, and gradients of weights.
#include <arch/convert.h>

#include "pool/softmax.h"
#include "pool/steps.h"

namespace ercn::pool {
namespace {

using arch::Vector16;

// The largest score of a bag, shifted; by a whole block.
template <int THREADS>
ERCN_DEVICE float largest_of_bag(const float* largest, int64_t slot, int64_t segments, int k, int K, float* scratch) {
  float most = -INFINITY;
  for (int64_t s = arch::thread_index(); s < segments; s += THREADS) most = fmaxf(most, largest[(slot + s) * K + k]);
  return shift_of(reduce_block<Max, THREADS>(most, scratch));
}

// One block: a bag, a head and kChannels channels. Eight threads with four channels each read a segment's sum; kLanes
// segments at once.
template <typename Element>
struct Combine {
  using Params = CombineParams;
  static constexpr int kThreads = 256, kMinBlocks = 1, kChannels = 32, kLanes = kThreads / (kChannels / 4);
  struct Shared {
    float sums[kLanes][kChannels / 4][5];
    float scratch[kThreads / 32];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int D = p.D, K = p.K;
    const int blocks = arch::divide_up(D, kChannels), block = arch::block_index().x, row = block / blocks, k = row % K;
    const int64_t bag = row / K, slot = first_slot(p.bags, bag), segments = bag_segments(p.bags, bag);
    const float largest = largest_of_bag<kThreads>(p.softmax.largest, slot, segments, k, K, shared.scratch);

    const int thread = arch::thread_index(), lane = thread / (kChannels / 4), four = thread % (kChannels / 4);
    const int d = block % blocks * kChannels + 4 * four;
    float (&z)[5] = shared.sums[lane][four];  // four channels and Σ e
    float sums[5] = {};
    for (int64_t s = lane; s < segments; s += kLanes) {
      const int64_t at = (slot + s) * K + k;
      const float scale = exp_fast(p.softmax.largest[at] - largest);
      sums[4] += scale * p.softmax.sum[at];
      if (d < D) {
        const Vector16 part = arch::load_16(p.sums + at * pooled_width(D) + d);
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
    Element* pooled = static_cast<Element*>(p.pooled) + int64_t{row} * D + d;
    for (int i = 0; i < 4 && d + i < D; ++i) pooled[i] = arch::from_float<Element>(z[i] / sum);
  }
};

// One block: a bag and a head.
struct CombineStatistics {
  using Params = StatisticsParams;
  static constexpr int kThreads = 128, kMinBlocks = 1;
  struct Shared {
    float scratch[kThreads / 32];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int K = p.K, row = arch::block_index().x, k = row % K;
    const int64_t bag = row / K, slot = first_slot(p.bags, bag), segments = bag_segments(p.bags, bag);
    const float largest = largest_of_bag<kThreads>(p.softmax.largest, slot, segments, k, K, shared.scratch);
    float sum = 0, weighted = 0;
    for (int64_t s = arch::thread_index(); s < segments; s += kThreads) {
      const int64_t at = (slot + s) * K + k;
      const float scale = exp_fast(p.softmax.largest[at] - largest);
      sum += scale * p.softmax.sum[at];
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

// One block: COLUMNS columns, and LANES threads for each that take every LANES-th row.
template <typename Element, int COLUMNS, int LANES>
struct ColumnSums {
  using Params = ColumnSumsParams;
  static constexpr int kThreads = COLUMNS * LANES, kMinBlocks = 1;
  struct Shared {
    float sums[LANES][COLUMNS];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = arch::thread_index() / COLUMNS, i = arch::thread_index() % COLUMNS;
    const int64_t column = int64_t{arch::block_index().x} * COLUMNS + i;
    float sum = 0;
    if (column < p.columns) {
      for (int64_t row = lane; row < p.rows; row += LANES) sum += p.parts[row * p.stride + column];
    }
    shared.sums[lane][i] = sum;
    for (int half = LANES / 2; half > 0; half /= 2) {
      arch::sync_threads();
      if (lane < half) shared.sums[lane][i] += shared.sums[lane + half][i];
    }
    if (lane > 0 || column >= p.columns) return;
    static_cast<Element*>(p.to)[column] = arch::from_float<Element>(shared.sums[0][i]);
  }
};

}  // namespace

void combine(const CombineParams& p, const arch::Stream& stream) {
  with_element(p.type, [&](auto element) {
    using Kernel = Combine<decltype(element)>;
    const int64_t blocks = p.bags.count * p.K * arch::divide_up(p.D, Kernel::kChannels);
    arch::launch<Kernel>(p, {static_cast<int>(blocks)}, sizeof(typename Kernel::Shared), stream);
  });
}

void combine_statistics(const StatisticsParams& p, const arch::Stream& stream) {
  arch::launch<CombineStatistics>(p, {static_cast<int>(p.bags.count * p.K)}, sizeof(CombineStatistics::Shared), stream);
}

void column_sums(const ColumnSumsParams& p, const arch::Stream& stream) {
  const auto start = [&](auto kernel, int columns) {
    using Kernel = decltype(kernel);
    const int64_t blocks = arch::divide_up<int64_t>(p.columns, columns);
    arch::launch<Kernel>(p, {static_cast<int>(blocks)}, sizeof(typename Kernel::Shared), stream);
  };
  with_element(p.type, [&](auto element) {
    using Element = decltype(element);
    constexpr int kFew = 32;  // splits are few rows of many columns, segments many rows of few
    p.rows <= kFew ? start(ColumnSums<Element, 256, 1>(), 256) : start(ColumnSums<Element, 32, 16>(), 32);
  });
}

}  // namespace ercn::pool
