#pragma once
// The partial sums of slabs, added in their order: out[i] = Σ_s parts[s · count + i].
#include <arch/launch.h>

#include "affinity/generic/tiles.h"

namespace ercn::affinity {

template <typename Element>
struct SumSlabs {
  struct Params {
    const float* parts;
    Element* out;
    int64_t count;
    int slabs;
  };
  static constexpr int kThreads = affinity::kThreads, kMinBlocks = 1, kRun = 8, kBlock = kRun * kThreads;

  ERCN_DEVICE static void run(const Params& p, unsigned char*) {
    const int64_t i = (static_cast<int64_t>(arch::block_index().x) * kThreads + arch::thread_index()) * kRun;
    if (i >= p.count) return;
    if (p.count % kRun != 0) {  // then the slabs do not begin at multiples of 16 bytes
      for (int k = 0; k < kRun && i + k < p.count; ++k) {
        float sum = 0;
        for (int s = 0; s < p.slabs; ++s) sum += p.parts[s * p.count + i + k];
        p.out[i + k] = arch::from_float<Element>(sum);
      }
      return;
    }
    float sum[kRun] = {};
    for (int s = 0; s < p.slabs; ++s) {
#pragma unroll
      for (int half = 0; half < kRun / 4; ++half) {
        const arch::Vector16 four = arch::load_16(p.parts + s * p.count + i + 4 * half);
        for (int k = 0; k < 4; ++k) sum[4 * half + k] += arch::float_of(four.words[k]);
      }
    }
    constexpr int kVector = 16 / sizeof(Element);
#pragma unroll
    for (int first = 0; first < kRun; first += kVector) {
      arch::Vector16 packed;
      for (int k = 0; k < 4; ++k) {
        if constexpr (sizeof(Element) == 4) {
          packed.words[k] = arch::float_bits(sum[first + k]);
        } else {
          packed.words[k] = arch::pack<Element>(sum[first + 2 * k], sum[first + 2 * k + 1]);
        }
      }
      arch::store_16(p.out + i + first, packed);
    }
  }
};

}  // namespace ercn::affinity
