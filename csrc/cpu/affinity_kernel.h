#pragma once
// One pair of blocks of Y = A · V and of its gradients, for one instruction set (see affinity.h and simd.h).
// Zero padding is only ever an output or a tile's spare lane: sums run over real pixels and channels (0 · Inf = NaN).
#include "affinity.h"
#include "simd.h"

namespace ercn::ERCN_ISA {

template <typename T>
constexpr int64_t kPanel = kVecs * kVecBytes / sizeof(T);

template <typename T>
constexpr int64_t kStrip = 3 * kVecBytes / sizeof(T);

constexpr int kNarrowBytes = kVecBytes < 32 ? kVecBytes : 32;  // vectors for C columns: few channels, few idle lanes

// out[m, n] += Σ_k s(m, k) · b[k, n] for m < rows, n < columns, k < depth, with s = a [kBlock, kBlock] or its
// transpose.
template <bool TRANSPOSED, int ROWS, int VECS, typename V, typename T>
ERCN_INLINE void column_strip(const T* s, int64_t rows, const T* b, int64_t ld, int64_t depth, T* out, int64_t out_ld) {
  for (int64_t m = 0; m < rows; m += ROWS) {
    tile_add_product<ROWS, VECS, V>(s + m * (TRANSPOSED ? 1 : kBlock), TRANSPOSED ? 1 : kBlock, TRANSPOSED ? kBlock : 1,
                                    b, ld, depth, out + m * out_ld, out_ld);
  }
}

// The same for any number of columns: 8×3, 8×2 and 16×1 sums, about half of them where there are 16 registers. Every
// panel is a multiple of these rows.
template <bool TRANSPOSED, int BYTES, typename T>
ERCN_INLINE void add_product(const T* s, int64_t rows, const T* b, int64_t ld, int64_t depth, T* out, int64_t out_ld,
                             int64_t columns) {
  constexpr int64_t lanes = BYTES / sizeof(T);
  constexpr int tall = kVecBytes == 32 ? 12 : kPanel<T> % 16 == 0 ? 16 : kRows;
  using V = Vec<T, BYTES>;
  int64_t n = 0;
  for (; n + 2 * lanes < columns; n += 3 * lanes) {
    column_strip<TRANSPOSED, kRows, 3, V>(s, rows, b + n, ld, depth, out + n, out_ld);
  }
  if (n + lanes < columns) {
    column_strip<TRANSPOSED, kRows, 2, V>(s, rows, b + n, ld, depth, out + n, out_ld);
  } else if (n < columns) {
    column_strip<TRANSPOSED, tall, 1, V>(s, rows, b + n, ld, depth, out + n, out_ld);
  }
}

// T[m, :] of kRows pixels and one panel, from panels of F.
template <typename T>
ERCN_INLINE void affinity_tile(const T* a, const T* b, int64_t D, Vec<T> (&sum)[kRows][kVecs]) {
  tile_product<kRows, kVecs>(a, 1, kPanel<T>, b, kPanel<T>, D, sum);
}

#if defined(ERCN_AVX512_BF16)
// Products of two channels at a time, added in fp32; D is even.
ERCN_INLINE void affinity_tile(const uint16_t* a, const uint16_t* b, int64_t D, Vec<float> (&sum)[kRows][kVecs]) {
  constexpr int64_t panel = kPanel<float>;
  for (int64_t k = 0; k < D; k += 2) {
    __m512bh row[kVecs];
    ERCN_UNROLL for (int v = 0; v < kVecs; ++v) row[v] = (__m512bh)_mm512_loadu_si512(b + k * panel + v * 32);
    ERCN_UNROLL for (int m = 0; m < kRows; ++m) {
      int32_t two;
      __builtin_memcpy(&two, a + k * panel + m * 2, 4);
      const __m512bh scale = (__m512bh)_mm512_set1_epi32(two);
      ERCN_UNROLL for (int v = 0; v < kVecs; ++v) sum[m][v] = _mm512_dpbf16_ps((__m512)sum[m][v], row[v], scale);
    }
  }
}
template <typename E>
constexpr int64_t kPacked = sizeof(E) == 2 ? 2 : 1;  // elements of one pixel side by side in a panel
#else
template <typename E>
constexpr int64_t kPacked = 1;
#endif

// Pixels [i, i + rows) against [j, j + columns): T, then A and W in scratch, then the sums for j and, of two different
// ranges, for i. i and j are multiples of the panel.
template <typename E, typename T>
ERCN_INLINE void rectangle(const AffinityImage<E, T>& p, int64_t i, int64_t rows, int64_t j, int64_t columns,
                           T* affinity, T* weight) {
  constexpr int64_t panel = kPanel<T>, lanes = kVecBytes / sizeof(T);
  const int64_t depth = round_up(p.D, kPacked<E>);
  for (int64_t n = 0; n < columns; n += panel) {
    const E* feat_j = p.feat_panels + (j + n) * depth;
    for (int64_t m = 0; m < rows; m += kRows) {
      const int64_t at = i + m;
      Vec<T> sum[kRows][kVecs] = {};
      T* w = weight + m * kBlock + n;
      if (p.out_feat) {
        Vec<T> rank[kRows][kVecs] = {};
        tile_product<kRows, kVecs>(
            p.value_rows + at * p.value_row, p.value_row, 1, p.pair_panels + (j + n) * 2 * p.C, panel, 2 * p.C, rank);
        ERCN_UNROLL for (int r = 0; r < kRows; ++r) {
          ERCN_UNROLL for (int v = 0; v < kVecs; ++v) store(w + r * kBlock + v * lanes, rank[r][v]);
        }
      }
      affinity_tile(p.feat_panels + at / panel * panel * depth + at % panel * kPacked<E>, feat_j, depth, sum);
      ERCN_UNROLL for (int r = 0; r < kRows; ++r) {
        ERCN_UNROLL for (int v = 0; v < kVecs; ++v) {
          const Vec<T> t = sum[r][v], zero = {};
          T* to = w + r * kBlock + v * lanes;
          if (p.out_feat) store(to, t <= 0 ? zero : load<Vec<T>>(to));  // NaN passes, as in torch's threshold_backward
          if (p.out_rows) store(affinity + (to - weight), t <= 0 ? zero : t);
        }
      }
    }
  }
  const bool both = i != j;
  if (p.out_rows) {
    const T* value = p.value_rows + (p.out_feat ? p.C : 0);
    add_product<true, kNarrowBytes>(affinity, columns, value + i * p.value_row, p.value_row, rows,
                                    p.out_rows + j * p.out_row, p.out_row, p.C);
    if (both) {
      add_product<false, kNarrowBytes>(affinity, rows, value + j * p.value_row, p.value_row, columns,
                                       p.out_rows + i * p.out_row, p.out_row, p.C);
    }
  }
  if (p.out_feat) {
    const int64_t block = round_up(p.D, kStrip<T>) * kBlock;
    const int64_t at_i = i / kBlock * block + i % kBlock * kStrip<T>,
                  at_j = j / kBlock * block + j % kBlock * kStrip<T>;
    for (int64_t d = 0; d < p.D; d += kStrip<T>) {
      const T* from = p.feat_strips + d * kBlock;
      T* to = p.out_feat + d * kBlock;
      const int64_t width = p.D - d < kStrip<T> ? p.D - d : kStrip<T>;
      add_product<true, kVecBytes>(weight, columns, from + at_i, kStrip<T>, rows, to + at_j, kStrip<T>, width);
      if (both)
        add_product<false, kVecBytes>(weight, rows, from + at_j, kStrip<T>, columns, to + at_i, kStrip<T>, width);
    }
  }
}

template <typename E, typename T>
void affinity_pair(const AffinityImage<E, T>& p, int64_t i, int64_t j, T* scratch) {
  const auto pixels = [&](int64_t from, int64_t limit) { return p.N - from < limit ? p.N - from : limit; };
  T *affinity = scratch, *weight = scratch + kBlock * kBlock;
  if (i != j) {
    rectangle(p, i * kBlock, kBlock, j * kBlock, pixels(j * kBlock, kBlock), affinity, weight);
    return;
  }
  // Of the diagonal block the panels on and right of the diagonal.
  for (int64_t n = i * kBlock; n < i * kBlock + pixels(i * kBlock, kBlock); n += kPanel<T>) {
    const int64_t columns = pixels(n, kPanel<T>);
    if (n > i * kBlock) rectangle(p, i * kBlock, n - i * kBlock, n, columns, affinity, weight);
    rectangle(p, n, columns, n, columns, affinity, weight);
  }
}

template <typename E, typename T>
AffinityKernel<E, T> affinity_kernel() {
  return {kPanel<T>, kStrip<T>, affinity_pair<E, T>};
}

}  // namespace ercn::ERCN_ISA
