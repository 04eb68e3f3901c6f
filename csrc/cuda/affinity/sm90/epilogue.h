#pragma once
// wgmma's accumulators added in fp32, and the epilogue: their stores to the workspace. Lane l of a warp has columns
// 8 q + 2 (l % 4) + {0, 1} of rows l / 4 and l / 4 + 8 of its 16 rows, in d[4 q + {0, 1}] and d[4 q + 2 + {0, 1}]; a
// warp's store fills whole 32-byte sectors.
#include <arch/wgmma.h>

namespace ercn::sm90::affinity {

// total += sums, after their wgmma_wait.
template <int COUNT>
ERCN_DEVICE void add(float (&total)[COUNT], float (&sums)[COUNT]) {
  arch::pin(sums);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) total[i] += sums[i];
}

// A lane's first row of a warpgroup's 64.
ERCN_DEVICE int own_row() { return arch::warp_index() % 4 * 16 + arch::lane_index() / 4; }

// Sums of 64 pixels and 2 P columns, the high and low terms of P channels -> to[channel][pixel].
template <int P>
ERCN_DEVICE void store_terms(float* to, int64_t stride, int channels, const float (&sums)[P]) {
#pragma unroll
  for (int i = 0; i < P / 2; ++i) {
    const int channel = i / 4 * 8 + arch::lane_index() % 4 * 2 + i % 2;
    if (channel < channels) to[channel * stride + own_row() + i / 2 % 2 * 8] = sums[i] + sums[i + P / 2];
  }
}

// Sums of 64 rows and 2 · HALF columns -> to[row][column].
template <int HALF>
ERCN_DEVICE void store_rows(float* to, const float (&sums)[HALF]) {
  constexpr int kColumns = 2 * HALF;
  float* own = to + own_row() * kColumns + arch::lane_index() % 4 * 2;
#pragma unroll
  for (int i = 0; i < HALF; i += 2) {
    float* at = own + i / 2 % 2 * 8 * kColumns + i / 4 * 8;
    at[0] = sums[i];
    at[1] = sums[i + 1];
  }
}

}  // namespace ercn::sm90::affinity
