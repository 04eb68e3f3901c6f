#pragma once
// Sums over a segment's rows and channels without tensor cores: Σ e h over rows, and q = ĝ · h over channels.
#include "pool/generic/segment_view.h"
#include "pool/softmax.h"

namespace ercn::pool {

// By a block of four warps. In rows of channels a warp takes every fourth row, a lane 16 bytes of channels; in channels
// of rows a few lanes share a channel, 16 bytes of rows each, and a warp takes every fourth set of channels.
template <typename Element, bool CHANNELS_FIRST>
struct Streaming {
  static constexpr int kVector = 16 / sizeof(Element), kWarps = 4, kThreads = 32 * kWarps, kHeads = 4;
  static constexpr int kSpan = 32 * kVector;               // channels of a warp, in rows
  static constexpr int kLanes = kSegmentRows / kVector;    // of a channel, in channels of rows
  static constexpr int kSets = 32 / kLanes;                // channels of a warp
  struct Shared {
    float sums[kWarps][kHeads][kSpan];
  };

  // to[k, d] = Σ_row e[k][row] h[row, d] over real rows; `to` has rows of `width` floats, e is in shared memory.
  ERCN_DEVICE static void sum_rows(
      const SegmentView<Element>& h, uint64_t real, const float (*e)[kSegmentRows], int heads, float* to, int64_t width,
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

  // Each warp's part of q[k, row] = Σ_d ĝ[k, d] h[row, d], real row or not; ĝ has at most kHeads rows of D.
  ERCN_DEVICE static void dot_channels(
      const SegmentView<Element>& h, const Element* grad, int heads, float (&products)[kWarps][kHeads][kSegmentRows]) {
    if constexpr (CHANNELS_FIRST) {
      dot_channels_of_channels(h, grad, heads, products);
    } else {
      dot_channels_of_rows(h, grad, heads, products);
    }
  }

  // q of a row from the parts of all warps.
  ERCN_DEVICE static float total(const float (&products)[kWarps][kHeads][kSegmentRows], int k, int row) {
    if constexpr (!CHANNELS_FIRST) return products[row % kWarps][k][row];
    float sum = products[0][k][row];
    for (int w = 1; w < kWarps; ++w) sum += products[w][k][row];
    return sum;
  }

 private:
  ERCN_DEVICE static void dot_channels_of_rows(
      const SegmentView<Element>& h, const Element* grad, int heads, float (&products)[kWarps][kHeads][kSegmentRows]) {
    constexpr int kRows = kSegmentRows / kWarps;
    const int warp = arch::warp_index(), lane = arch::lane_index();
    const bool aligned = h.D % kVector == 0 && reinterpret_cast<uintptr_t>(grad) % 16 == 0;
    float sums[kRows][kHeads] = {};
    for (int d = lane * kVector; d < h.D; d += kSpan) {
      float g[kHeads][kVector];
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        if (k < heads) read(g[k], grad + int64_t{k} * h.D + d, 1, h.D - d, aligned);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = warp + i * kWarps;
        if (row >= h.rows) break;
        float x[kVector];
        read(x, h.first + row * h.stride_n + d * h.stride_d, h.stride_d, h.D - d, h.vector);
#pragma unroll
        for (int k = 0; k < kHeads; ++k) {
          if (k >= heads) break;
#pragma unroll
          for (int j = 0; j < kVector; ++j) sums[i][k] += g[k][j] * x[j];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      if (k >= heads) break;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float sum = reduce_warp<Add>(sums[i][k]);
        if (lane == 0) products[warp][k][warp + i * kWarps] = sum;
      }
    }
  }

  ERCN_DEVICE static void dot_channels_of_channels(
      const SegmentView<Element>& h, const Element* grad, int heads, float (&products)[kWarps][kHeads][kSegmentRows]) {
    const int warp = arch::warp_index(), lane = arch::lane_index(), row = lane % kLanes * kVector;
    float sums[kHeads][kVector] = {};
#pragma unroll 4
    for (int d = warp * kSets + lane / kLanes; d < h.D; d += kWarps * kSets) {
      float x[kVector];
      read(x, h.first + row * h.stride_n + d * h.stride_d, h.stride_n, h.rows - row, h.vector);
#pragma unroll
      for (int k = 0; k < kHeads; ++k) {
        if (k >= heads) break;
        const float g = arch::to_float(grad[int64_t{k} * h.D + d]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[k][i] += g * x[i];
      }
    }
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      if (k >= heads) break;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float sum = sums[k][i];
#pragma unroll
        for (int mask = kLanes; mask < 32; mask *= 2) sum += arch::shuffle_xor(sum, mask);
        if (lane < kLanes) products[warp][k][row + i] = sum;
      }
    }
  }

  ERCN_DEVICE static void sum_rows_of_rows(
      const SegmentView<Element>& h, uint64_t real, const float (*e)[kSegmentRows], int heads, float* to, int64_t width,
      Shared& shared) {
    const int warp = arch::warp_index(), lane = arch::lane_index();
    for (int span = 0; span < h.D; span += kSpan) {
      const int d = span + lane * kVector;
      float sums[kHeads][kVector] = {};
#pragma unroll 4
      for (int row = warp; row < h.rows; row += kWarps) {
        if ((real >> row & 1) == 0) continue;
        float x[kVector];
        read(x, h.first + row * h.stride_n + d * h.stride_d, h.stride_d, h.D - d, h.vector);
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
      for (int at = arch::thread_index(); at < heads * kSpan; at += kThreads) {
        const int k = at / kSpan, i = at % kSpan;
        float sum = shared.sums[0][k][i];
        for (int w = 1; w < kWarps; ++w) sum += shared.sums[w][k][i];
        if (span + i < h.D) to[k * width + span + i] = sum;
      }
      arch::sync_threads();
    }
  }

  ERCN_DEVICE static void sum_rows_of_channels(
      const SegmentView<Element>& h, uint64_t real, const float (*e)[kSegmentRows], int heads, float* to,
      int64_t width) {
    const int lane = arch::lane_index(), row = lane % kLanes * kVector;
    for (int span = 0; span < h.D; span += kWarps * kSets) {  // the same for all lanes, which shuffle
      const int d = span + arch::warp_index() * kSets + lane / kLanes;
      float x[kVector], sums[kHeads] = {};
      read(x, h.first + row * h.stride_n + d * h.stride_d, h.stride_n, d < h.D ? h.rows - row : 0, h.vector);
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
