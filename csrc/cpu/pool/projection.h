#pragma once
// The hidden layer's panels, products with them, dropout and activations.
// Padded hidden units are selected away, never multiplied by 0: 0 · Inf = NaN.
#include "../activations.h"
#include "rows.h"

namespace ercn::ERCN_ISA {

// Rows of a tile of two vectors.
constexpr int kProjectionRows = kVecBytes == 64 ? 8 : kVecBytes == 32 ? 6 : 4;

// Packs two vectors of hidden units, [depth, 2, lanes], with depth in pairs, [depth / 2, 2, lanes, 2], for bfloat16.
template <typename X, typename T, typename W>
void pack_panel(const HiddenLayer<T, W>& layer, int64_t panel) {
  constexpr int64_t n = kLanes<T>;
  const int64_t depth = operand_depth<X>(layer.D);
  X* to = static_cast<X*>(layer.projections) + panel * depth * 2 * n;
  for (int64_t half = 0; half < 2; ++half) {
    const Matrix<W>& weight = half == 1 && layer.branches == 2 ? layer.u : layer.v;
    const int64_t first = layer.branches == 2 ? panel * n : (panel * 2 + half) * n;
    const int64_t units = layer.L - first < 0 ? 0 : layer.L - first < n ? layer.L - first : n;
    const W* from = weight.at + first * weight.row;
    if constexpr (sizeof(X) == 2) {
      for (int64_t l = 0; l < n; ++l) {
        for (int64_t d = 0; d < depth; ++d) {
          to[((d / 2 * 2 + half) * n + l) * 2 + d % 2] =
              l < units && d < layer.D ? from[l * weight.row + d * weight.col] : 0;
        }
      }
    } else {
      if (units < n) {
        for (int64_t d = 0; d < depth; ++d) store(to + (d * 2 + half) * n, Vec<T>{});
      }
      copy_matrix(Matrix<W>{from, weight.col, weight.row}, depth, units, to + half * n, 2 * n);
    }
  }
}

template <int ROWS, typename T>
ERCN_INLINE void project(Matrix<T> x, const T* panel, int64_t depth, Vec<T> (&sum)[ROWS][2]) {
  tile_product<ROWS, 2>(x.at, x.row, 1, panel, 2 * kLanes<T>, depth, sum);
}
#if defined(ERCN_AVX512_BF16)
template <int ROWS>
ERCN_INLINE void project(Matrix<uint16_t> x, const uint16_t* panel, int64_t depth, Vec<float> (&sum)[ROWS][2]) {
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh row[2];
    ERCN_UNROLL for (int v = 0; v < 2; ++v) row[v] = (__m512bh)_mm512_loadu_si512(panel + k * 32 + v * 32);
    ERCN_UNROLL for (int m = 0; m < ROWS; ++m) {
      int32_t two;
      __builtin_memcpy(&two, x.at + m * x.row + k, 4);
      const __m512bh scale = (__m512bh)_mm512_set1_epi32(two);
      ERCN_UNROLL for (int v = 0; v < 2; ++v) sum[m][v] = _mm512_dpbf16_ps((__m512)sum[m][v], row[v], scale);
    }
  }
}
#endif

// Calls use(m, sums) for every row m of the block with its two vectors of one panel, biases added.
template <int ROWS, typename X, typename T, typename F>
ERCN_INLINE void project_rows(
    Matrix<X> x, int64_t& m, int64_t rows, const X* panel, const T* bias, int64_t depth, const F& use) {
  for (; m + ROWS <= rows; m += ROWS) {
    Vec<T> sum[ROWS][2];
    ERCN_UNROLL for (int r = 0; r < ROWS; ++r) {
      ERCN_UNROLL for (int v = 0; v < 2; ++v) sum[r][v] = load<Vec<T>>(bias + v * kLanes<T>);
    }
    project<ROWS>(Matrix<X>{x.at + m * x.row, x.row, 1}, panel, depth, sum);
    Vec<T> stored[ROWS][2];  // in memory, so that the loop below need not be unrolled
    ERCN_UNROLL for (int r = 0; r < ROWS; ++r) { ERCN_UNROLL for (int v = 0; v < 2; ++v) stored[r][v] = sum[r][v]; }
#pragma GCC unroll 1
    for (int r = 0; r < ROWS; ++r) use(m + r, stored[r]);
  }
}

template <typename X, typename T, typename F>
ERCN_INLINE void project_block(Matrix<X> x, int64_t rows, const X* panel, const T* bias, int64_t depth, const F& use) {
  int64_t m = 0;
  project_rows<kProjectionRows>(x, m, rows, panel, bias, depth, use);
  project_rows<kProjectionRows / 2>(x, m, rows, panel, bias, depth, use);
  project_rows<1>(x, m, rows, panel, bias, depth, use);
}

// Lanes of the hidden units from `first` on that exist; the others become 0, whatever they are.
template <typename T>
ERCN_INLINE Vec<T> existing(Vec<T> x, int64_t first, int64_t L) {
  for (int64_t l = L - first < 0 ? 0 : L - first; l < kLanes<T>; ++l) x[l] = 0;
  return x;
}

// ---- dropout and activations ----

using Words = Vec<uint32_t>;
using Wide = Vec<uint64_t>;  // words in the lower halves of the lanes; what the upper ones hold does not matter
constexpr int kWords = kVecBytes / 4;

// The 64-bit products of the lower halves.
ERCN_INLINE Wide multiply(Wide x, uint32_t factor) {
#if defined(ERCN_AVX512)
  return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)x, _mm512_set1_epi64(factor));  // without a mask GCC 12 warns
#elif defined(ERCN_AVX2)
  return (Wide)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#else
  return (x & 0xffffffff) * factor;
#endif
}

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011): random bits as a function of a counter and a key, the same on
// every instruction set. Four words for each of the counters (first, second, third + lane, 0): those of even lanes and
// those of odd lanes go side by side, so that no word changes its lane until the end.
ERCN_INLINE void philox(
    uint32_t first, uint32_t second, uint32_t third, const uint64_t (&keys)[10][2], Words (&out)[4]) {
  Wide even[4] = {Wide{} + first, Wide{} + second, Wide{} + third, {}}, odd[4];
  for (int i = 0; i < kWords / 2; ++i) even[2][i] += 2 * i;
  ERCN_UNROLL for (int j = 0; j < 4; ++j) odd[j] = even[j];
  odd[2] += 1;
  ERCN_UNROLL for (int round = 0; round < 10; ++round) {
    ERCN_UNROLL for (Wide* x : {even, odd}) {
      const Wide a = multiply(x[0], 0xD2511F53), c = multiply(x[2], 0xCD9E8D57);
      x[0] = c >> 32 ^ x[1] ^ keys[round][0], x[1] = c;
      x[2] = a >> 32 ^ x[3] ^ keys[round][1], x[3] = a;
    }
  }
  ERCN_UNROLL for (int j = 0; j < 4; ++j) out[j] = (Words)((even[j] & 0xffffffff) | odd[j] << 32);
}

// Random bits of kDropUnits hidden units from `unit` on, for `rows` instances.
template <typename E>
__attribute__((noinline)) void draw(
    const Instances<E>& in, const Dropout& dropout, int64_t first, int64_t rows, int64_t unit, uint32_t* words) {
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t i = instance(in, first + m);
    ERCN_UNROLL for (int part = 0; part < 16; part += kWords) {
      Words out[4];
      philox(static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), unit / 4 + part, dropout.keys, out);
      ERCN_UNROLL for (int j = 0; j < 4; ++j) store(words + m * kDropUnits + j * 16 + part, out[j]);
    }
  }
}

ERCN_INLINE Vec<int32_t> bits_of(const uint32_t* words, float) { return load<Vec<int32_t>>(words); }
ERCN_INLINE Vec<int64_t> bits_of(const uint32_t* words, double) {
  return __builtin_convertvector(load<Vec<uint32_t, kVecBytes / 2>>(words), Vec<int64_t>);
}

template <typename V, typename I>
ERCN_INLINE V kept(V x, I bits, const Dropout& dropout) {
  typedef decltype(x[0] + x[0]) T;
  return (bits & 0xffff) < dropout.threshold ? V{} : x * static_cast<T>(dropout.scale);
}

// act(x), and act'(x) where SLOPE. As in torch, relu'(0) is 0.
template <bool SLOPE, typename T>
ERCN_INLINE Vec<T> activate(Activation activation, Vec<T> x, Vec<T>& slope) {
  if (activation == Activation::tanh) {
    const Vec<T> t = tanh(x);
    if (SLOPE) slope = 1 - t * t;
    return t;
  }
  if (activation == Activation::relu) {
    if (SLOPE) slope = x <= 0 ? Vec<T>{} : Vec<T>{} + 1;
    return x < 0 ? Vec<T>{} : x;
  }
  Vec<T> cumulative, density;
  normal(x, cumulative, density);
  if (SLOPE) slope = cumulative + density;
  return x * cumulative;
}

}  // namespace ercn::ERCN_ISA
