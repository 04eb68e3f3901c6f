#pragma once
// One pair of blocks of Y = A · V and of its gradients, for one instruction set (see affinity.h and simd.h).
// Zero padding is an output, fills spare lanes of a tile, or meets only zeros: else 0 · Inf would be NaN.
#include "../simd.h"
#include "affinity.h"

namespace ercn::ERCN_ISA {

template <typename T>
constexpr int64_t kPanel = kVecs * kVecBytes / sizeof(T);

template <typename T>
constexpr int64_t kStrip = 3 * kVecBytes / sizeof(T);

// ---- products of tiles ----

// out[m, n] += Σ_k s(m, k) · b[k, n] for m < rows, k < depth; s is [kBlock, kBlock], or the transpose of that. With
// UNIT 2 k counts pairs of neighbours in a row of s, and b has a row for each.
template <bool TRANSPOSED, int UNIT, int ROWS, int VECS, typename T>
ERCN_INLINE void column_strip(const T* s, int64_t rows, const T* b, int64_t ld, int64_t depth, T* out, int64_t out_ld) {
  static_assert(!TRANSPOSED || UNIT == 1);
  for (int64_t m = 0; m < rows; m += ROWS) {
    tile_add_product<ROWS, VECS, Vec<T>, UNIT>(
        s + m * (TRANSPOSED ? 1 : kBlock), TRANSPOSED ? 1 : kBlock, TRANSPOSED ? kBlock : UNIT, b, ld, depth,
        out + m * out_ld, out_ld);
  }
}

// The same for any number of columns n: 8×3, 8×2 and 16×1 sums in 32 registers, 4×3, 4×2 and 12×1 or 4×1 in 16.
template <bool TRANSPOSED, int UNIT = 1, typename T>
ERCN_INLINE void add_product(
    const T* s, int64_t rows, const T* b, int64_t ld, int64_t depth, T* out, int64_t out_ld, int64_t columns) {
  constexpr int64_t lanes = kVecBytes / sizeof(T);
  constexpr int tall = kVecBytes == 64 ? 16 : kVecBytes == 32 ? 12 : kRows;
  static_assert(kPanel<T> % tall == 0 && kPanel<T> % kRows == 0);
  int64_t n = 0;
  for (; n + 2 * lanes < columns; n += 3 * lanes) {
    column_strip<TRANSPOSED, UNIT, kRows, 3>(s, rows, b + n, ld, depth, out + n, out_ld);
  }
  if (n + lanes < columns) {
    column_strip<TRANSPOSED, UNIT, kRows, 2>(s, rows, b + n, ld, depth, out + n, out_ld);
  } else if (n < columns) {
    column_strip<TRANSPOSED, UNIT, tall, 1>(s, rows, b + n, ld, depth, out + n, out_ld);
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

// ---- the steps of a pair ----

// Pixels [i, i + rows) against [j, j + columns): a rectangle of T within one pair of blocks. i and j are multiples of
// the panel.
struct Rectangle {
  int64_t i, rows, j, columns;

  bool on_diagonal() const { return i == j; }
};

// Where pixel n of panels of a block has its first row.
ERCN_INLINE int64_t in_block(int64_t n, int64_t channels) { return n / kBlock * kBlock * channels + n % kBlock; }

// VᵀG + GᵀV of kRows pixels from m on, and one panel from n on.
template <typename E, typename T>
ERCN_INLINE void outer_products(const AffinityImage<E, T>& p, int64_t m, int64_t n, Vec<T> (&sum)[kRows][kVecs]) {
  const int64_t row = in_block(m, p.channels), column = in_block(n, p.channels);
  tile_product<kRows, kVecs>(p.value + row, 1, kBlock, p.summed + column, kBlock, p.C, sum);
  tile_product<kRows, kVecs>(p.summed + row, 1, kBlock, p.value + column, kBlock, p.C, sum);
}

// Forms A, if the image has sums, and W, in the backward: both [kBlock, kBlock].
template <typename E, typename T>
ERCN_INLINE void form_affinity_and_weight(const AffinityImage<E, T>& p, const Rectangle& at, T* affinity, T* weight) {
  constexpr int64_t panel = kPanel<T>, lanes = kVecBytes / sizeof(T);
  const int64_t depth = round_up(p.D, kPacked<E>);
  const bool sums = p.column_sums, backward = p.out_feat;
  for (int64_t n = 0; n < at.columns; n += panel) {
    const E* feat_j = p.feat + (at.j + n) * depth;
    for (int64_t m = 0; m < at.rows; m += kRows) {
      const int64_t pixel = at.i + m;
      Vec<T> sum[kRows][kVecs] = {};
      T* w = weight + m * kBlock + n;
      if (backward) {
        Vec<T> outer[kRows][kVecs] = {};
        outer_products(p, pixel, at.j + n, outer);
        ERCN_UNROLL for (int r = 0; r < kRows; ++r) {
          ERCN_UNROLL for (int v = 0; v < kVecs; ++v) store(w + r * kBlock + v * lanes, outer[r][v]);
        }
      }
      affinity_tile(p.feat + pixel / panel * panel * depth + pixel % panel * kPacked<E>, feat_j, depth, sum);
      ERCN_UNROLL for (int r = 0; r < kRows; ++r) {
        ERCN_UNROLL for (int v = 0; v < kVecs; ++v) {
          const Vec<T> t = sum[r][v], zero = {};
          T* to = w + r * kBlock + v * lanes;
          if (backward) store(to, t <= 0 ? zero : load<Vec<T>>(to));  // NaN passes, as in torch's threshold_backward
          if (sums) store(affinity + (to - weight), t <= 0 ? zero : t);
        }
      }
    }
  }
}

// Adds to the sums of pixels j what pixels i give them.
template <typename E, typename T>
ERCN_INLINE void add_column_sums(const AffinityImage<E, T>& p, const Rectangle& at, const T* affinity) {
  const T* source = p.summed + in_block(at.i, p.channels);
  for (int64_t n = 0; n < at.columns; n += kPanel<T>) {
    T* to = p.column_sums + in_block(at.j + n, p.channels);
    for (int64_t c = 0; c < p.C * kBlock; c += kRows * kBlock) {
      tile_add_product<kRows, kVecs, Vec<T>>(source + c, kBlock, 1, affinity + n, kBlock, at.rows, to + c, kBlock);
    }
  }
}

// Adds to the sums of pixels i what pixels j give them.
template <typename E, typename T>
ERCN_INLINE void add_row_sums(const AffinityImage<E, T>& p, const Rectangle& at, T* affinity) {
  constexpr int64_t unit = kUnit<T>;
  if (at.columns % unit) {  // the last unit's second column is padding
    for (int64_t m = 0; m < at.rows; ++m) affinity[m * kBlock + at.columns] = T(0);
  }
  const int64_t row = p.channels * unit;
  add_product<false, unit>(
      affinity, at.rows, p.units + at.j * p.channels, row, (at.columns + unit - 1) / unit, p.row_sums + at.i * row, row,
      p.C * unit);
}

// Adds to out_feat of pixels j and, off the diagonal, of pixels i.
template <typename E, typename T>
ERCN_INLINE void add_feat_gradient(const AffinityImage<E, T>& p, const Rectangle& at, const T* weight) {
  constexpr int64_t strip = kStrip<T>;
  const int64_t block = round_up(p.D, strip) * kBlock;
  const auto in_strips = [&](int64_t n) { return n / kBlock * block + n % kBlock * strip; };
  for (int64_t d = 0; d < p.D; d += strip) {
    const T* from = p.feat_strips + d * kBlock;
    T* to = p.out_feat + d * kBlock;
    const int64_t width = p.D - d < strip ? p.D - d : strip, i = in_strips(at.i), j = in_strips(at.j);
    add_product<true>(weight, at.columns, from + i, strip, at.rows, to + j, strip, width);
    if (!at.on_diagonal()) add_product<false>(weight, at.rows, from + j, strip, at.columns, to + i, strip, width);
  }
}

template <typename E, typename T>
ERCN_INLINE void rectangle(const AffinityImage<E, T>& p, const Rectangle& at, T* scratch) {
  T *affinity = scratch, *weight = scratch + kBlock * kBlock;
  form_affinity_and_weight(p, at, affinity, weight);
  if (p.column_sums) {
    add_column_sums(p, at, affinity);
    if (!at.on_diagonal()) add_row_sums(p, at, affinity);
  }
  if (p.out_feat) add_feat_gradient(p, at, weight);
}

template <typename E, typename T>
void affinity_pair(const AffinityImage<E, T>& p, int64_t i, int64_t j, T* scratch) {
  const auto pixels = [&](int64_t from, int64_t limit) { return p.N - from < limit ? p.N - from : limit; };
  if (i != j) {
    rectangle(p, {i * kBlock, kBlock, j * kBlock, pixels(j * kBlock, kBlock)}, scratch);
    return;
  }
  // A diagonal block: only the panels on and right of the diagonal.
  for (int64_t n = i * kBlock; n < i * kBlock + pixels(i * kBlock, kBlock); n += kPanel<T>) {
    const int64_t columns = pixels(n, kPanel<T>);
    if (n > i * kBlock) rectangle(p, {i * kBlock, n - i * kBlock, n, columns}, scratch);
    rectangle(p, {n, columns, n, columns}, scratch);
  }
}

template <typename E, typename T>
AffinityKernel<E, T> affinity_kernel() {
  return {kPanel<T>, kStrip<T>, affinity_pair<E, T>};
}

}  // namespace ercn::ERCN_ISA
