#pragma once
// Sums over a segment's rows and channels that no tensor core is needed for: Σ e h over rows, and q = ĝ · h over channels.
#include "pool/instances.h"

namespace ercn::pool {

// Of a block of four warps. In rows of channels a warp takes every fourth row, a lane 16 bytes of channels; in channels of rows
// a few lanes share a channel, 16 bytes of rows each, and a warp takes every fourth set of channels.
template <typename Element, bool CHANNELS_FIRST>
struct Streaming {
  static constexpr int kVector = 16 / sizeof(Element), kWarps = 4, kHeads = 4;
  static constexpr int kSpan = 32 * kVector;               // channels of a warp, in rows
  static constexpr int kLanes = kSegmentRows / kVector;    // of a channel, in channels of rows
  static constexpr int kSets = 32 / kLanes;                // channels of a warp
  struct Shared {
    float sums[kWarps][kHeads][kSpan];
  };

  // to[k, d] = Σ_row e[k][row] h[row, d] over real rows; `to` has rows of `width` floats, e is in shared memory.
  ERCN_DEVICE static void sum_rows(
      const Instances<Element>& h, uint64_t real, const float (*e)[kSegmentRows], int heads, float* to, int64_t width,
      Shared& shared) {
    for (int first = 0; first < heads; first += kHeads) {
      const int count = heads - first < kHeads ? heads - first : kHeads;
      if constexpr (CHANNELS_FIRST) {
        sum_rows_of_channels(h, real, e + first, count, to + first * width, width);
      } else {
        sum_rows_of_rows(h, real, e + first, count, to + first * width, width, shared);
      }
    }
  }

 private:
  ERCN_DEVICE static void sum_rows_of_rows(
      const Instances<Element>& h, uint64_t real, const float (*e)[kSegmentRows], int heads, float* to, int64_t width,
      Shared& shared) {
    const int warp = arch::warp_index(), lane = arch::lane_index();
    for (int span = 0; span < h.D; span += kSpan) {
      const int d = span + lane * kVector;
      float sums[kHeads][kVector] = {};
#pragma unroll 4
      for (int row = warp; row < h.rows; row += kWarps) {
        if ((real >> row & 1) == 0) continue;
        float x[kVector];
        read(x, h.first + row * h.h_n + d * h.h_d, h.h_d, h.D - d, h.vector);
#pragma unroll
        for (int k = 0; k < kHeads; ++k) {
          if (k >= heads) break;
          const float weight = e[k][row];
#pragma unroll
          for (int i = 0; i < kVector; ++i) sums[k][i] += weight * x[i];
        }
      }
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        if (k >= heads) break;
#pragma unroll
        for (int i = 0; i < kVector; ++i) shared.sums[warp][k][lane * kVector + i] = sums[k][i];
      }
      arch::sync_threads();
      for (int at = arch::thread_index(); at < heads * kSpan; at += 32 * kWarps) {
        const int k = at / kSpan, i = at % kSpan;
        float sum = shared.sums[0][k][i];
        for (int w = 1; w < kWarps; ++w) sum += shared.sums[w][k][i];
        if (span + i < h.D) to[k * width + span + i] = sum;
      }
      arch::sync_threads();
    }
  }

  ERCN_DEVICE static void sum_rows_of_channels(
      const Instances<Element>& h, uint64_t real, const float (*e)[kSegmentRows], int heads, float* to, int64_t width) {
    const int lane = arch::lane_index(), row = lane % kLanes * kVector;
    for (int span = arch::warp_index() * kSets; span < h.D; span += kWarps * kSets) {
      const int d = span + lane / kLanes;
      float x[kVector], sums[kHeads] = {};
      read(x, h.first + row * h.h_n + d * h.h_d, h.h_n, d < h.D ? h.rows - row : 0, h.vector);
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        if (k >= heads) break;
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[k] += (real >> (row + i) & 1) != 0 ? e[k][row + i] * x[i] : 0.0f;
#pragma unroll
        for (int mask = 1; mask < kLanes; mask *= 2) sums[k] += arch::shuffle_xor(sums[k], mask);
        if (lane % kLanes == 0 && d < h.D) to[k * width + d] = sums[k];
      }
    }
  }
};

}  // namespace ercn::pool
