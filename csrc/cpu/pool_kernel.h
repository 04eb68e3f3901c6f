#pragma once
// Gated attention pooling for one instruction set (see pool.h and simd.h).
// Padded hidden units are selected away, never multiplied by 0, and channels are not padded where h is read: 0 · Inf =
// NaN.
#include <utility>

#include "activations.h"
#include "philox.h"
#include "pool.h"

namespace ercn::ERCN_ISA {

template <typename T>
constexpr int64_t kLanes = kVecBytes / sizeof(T);
template <typename T>
constexpr int64_t kColumns = kVecs* kLanes<T>;

// What h and the weights are in the projections: bfloat16 where both are and there are dot products of it, otherwise as
// the sums.
template <typename E, typename T, typename W>
struct OperandOf {
  using type = T;
};
#if defined(ERCN_AVX512_BF16)
template <>
struct OperandOf<uint16_t, float, uint16_t> {
  using type = uint16_t;
};
#endif
template <typename E, typename T, typename W>
using Operand = typename OperandOf<E, T, W>::type;

// Rows of a tile of two vectors.
constexpr int kProjectionRows = kVecBytes == 64 ? 8 : kVecBytes == 32 ? 6 : 4;

// ---- elements ----

template <typename T>
ERCN_INLINE Vec<T> load_wide(const T* from) {
  return load<Vec<T>>(from);
}
ERCN_INLINE Vec<float> load_wide(const uint16_t* from) {
  const auto narrow = load<Vec<uint16_t, kVecBytes / 2>>(from);
  return (Vec<float>)(__builtin_convertvector(narrow, Vec<uint32_t>) << 16);
}

template <typename T>
ERCN_INLINE T wide(T x) {
  return x;
}
ERCN_INLINE float wide(uint16_t x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }

ERCN_INLINE void put(float* to, float x) { *to = x; }
ERCN_INLINE void put(double* to, double x) { *to = x; }
ERCN_INLINE void put(uint16_t* to, float x) {  // to nearest even; NaN stays one
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  *to = static_cast<uint16_t>(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

ERCN_INLINE float exponential(float x) { return __builtin_expf(x); }
ERCN_INLINE double exponential(double x) { return __builtin_exp(x); }

template <typename T>
ERCN_INLINE T sum_of(Vec<T> v) {
  T total = 0;
  for (unsigned i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

// ---- copies into the layouts of the products ----

template <int HALF, typename V, std::size_t... I>
ERCN_INLINE V interleave(V a, V b, std::index_sequence<I...>) {
  constexpr std::size_t n = sizeof...(I);
  return __builtin_shufflevector(a, b, (HALF * n / 2 + I / 2 + I % 2 * n)...);
}

// Rows become lanes: log2(lanes) perfect shuffles of the whole block.
template <typename T>
ERCN_INLINE void transpose(Vec<T> (&block)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  const auto lanes = std::make_index_sequence<n>{};
  ERCN_UNROLL for (int step = 1; step < n; step *= 2) {
    Vec<T> next[n];
    ERCN_UNROLL for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<0>(block[i], block[i + n / 2], lanes);
      next[2 * i + 1] = interleave<1>(block[i], block[i + n / 2], lanes);
    }
    ERCN_UNROLL for (int i = 0; i < n; ++i) block[i] = next[i];
  }
}

// to[r * to_row + c] = from(r, c), widened or not.
template <typename To, typename E>
ERCN_INLINE void copy_matrix(Matrix<E> from, int64_t rows, int64_t columns, To* to, int64_t to_row) {
  const auto element = [](E x) -> To {
    if constexpr (sizeof(To) == sizeof(E)) return x;
    else return wide(x);
  };
  if (from.col == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) to[r * to_row + c] = element(from.at[r * from.row + c]);
    }
    return;
  }
  int64_t blocked_rows = 0, blocked_columns = 0;
  if constexpr (sizeof(To) >= sizeof(float)) {
    if (from.row == 1) {
      constexpr int64_t n = kLanes<To>;
      blocked_rows = rows / n * n, blocked_columns = columns / n * n;
      for (int64_t r = 0; r < blocked_rows; r += n) {
        for (int64_t c = 0; c < blocked_columns; c += n) {
          Vec<To> block[n];
          ERCN_UNROLL for (int i = 0; i < n; ++i) block[i] = load_wide(from.at + (c + i) * from.col + r);
          transpose<To>(block);
          ERCN_UNROLL for (int i = 0; i < n; ++i) store(to + (r + i) * to_row + c, block[i]);
        }
      }
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = c < blocked_columns ? blocked_rows : 0; r < rows; ++r) {
      to[r * to_row + c] = element(from.at[r * from.row + c * from.col]);
    }
  }
}

template <typename E, typename T, typename W>
ERCN_INLINE int64_t instance(const Pool<E, T, W>& p, int64_t r) {
  return p.real ? p.real[r] : r;
}

template <typename E, typename T, typename W>
ERCN_INLINE const E* row_of(const Pool<E, T, W>& p, int64_t i) {
  return p.h + i / p.N * p.stride_b + i % p.N * p.stride_n;
}

// How many of the instances from r on, at most `limit`, lie one stride_n apart.
template <typename E, typename T, typename W>
ERCN_INLINE int64_t run_length(const Pool<E, T, W>& p, int64_t r, int64_t limit) {
  const int64_t i = instance(p, r);
  const bool flat = p.stride_b == p.N * p.stride_n;
  int64_t end = flat || p.N - i % p.N > limit ? limit : p.N - i % p.N;
  if (p.real) {
    int64_t n = 1;
    while (n < end && p.real[r + n] == i + n) ++n;
    end = n;
  }
  return end;
}

// Channels [d, d + columns) of instances [r, r + rows).
template <typename E, typename T, typename W, typename To>
ERCN_INLINE void gather(const Pool<E, T, W>& p, int64_t r, int64_t rows, int64_t d, int64_t columns, To* to,
                        int64_t to_row) {
  for (int64_t n = 0; n < rows;) {
    const int64_t run = run_length(p, r + n, rows - n);
    const E* from = row_of(p, instance(p, r + n)) + d * p.stride_d;
    copy_matrix(Matrix<E>{from, p.stride_n, p.stride_d}, run, columns, to + n * to_row, to_row);
    n += run;
  }
}

template <typename E, typename T, typename W>
ERCN_INLINE int64_t operand_depth(const Pool<E, T, W>& p) {  // bfloat16 is multiplied in pairs
  return sizeof(Operand<E, T, W>) == 2 ? (p.D + 1) / 2 * 2 : p.D;
}

// Memory of one task, cut in pieces.
template <typename E, typename T, typename W>
struct ChunkScratch {
  T *head_sums, *attention, *grad_scores;  // [chunk, K, lanes], [chunk, K] twice
  uint32_t* words;                         // [chunk, kDropUnits] random bits, with dropout
  Operand<E, T, W>* rows;                  // [chunk, row], if h is not used where it lies
  int64_t row, bytes;

  ERCN_INLINE ChunkScratch(const Pool<E, T, W>& p, void* memory) {
    // One cache line more than a multiple of 4 KiB: rows must not share their place in the cache.
    row = (p.D + 63) / 64 * 64 + 64 / sizeof(Operand<E, T, W>);
    head_sums = static_cast<T*>(memory);
    attention = head_sums + kMaxChunk * p.K * kLanes<T>;
    grad_scores = attention + kMaxChunk * p.K;
    words = reinterpret_cast<uint32_t*>(grad_scores + kMaxChunk * p.K);
    rows = reinterpret_cast<Operand<E, T, W>*>(words + (p.dropout ? kMaxChunk * kDropUnits : 0));
    bytes = reinterpret_cast<char*>(rows + kMaxChunk * row) - static_cast<char*>(memory);
  }
};

template <typename E, typename T, typename W>
int64_t chunk_scratch(const Pool<E, T, W>& p) {
  return ChunkScratch<E, T, W>(p, nullptr).bytes;
}

// Instances [r, r + rows) with channels side by side: in place where they lie so, otherwise copied.
template <typename E, typename T, typename W>
ERCN_INLINE Matrix<Operand<E, T, W>> operand(const Pool<E, T, W>& p, int64_t r, int64_t rows,
                                          const ChunkScratch<E, T, W>& scratch) {
  using X = Operand<E, T, W>;
  if constexpr (sizeof(X) == sizeof(E)) {
    if (p.stride_d == 1 && p.D == operand_depth(p) && run_length(p, r, rows) == rows) {
      return {reinterpret_cast<const X*>(row_of(p, instance(p, r))), p.stride_n, 1};
    }
  }
  gather(p, r, rows, 0, p.D, scratch.rows, scratch.row);
  if (operand_depth(p) > p.D) {
    for (int64_t n = 0; n < rows; ++n) scratch.rows[n * scratch.row + p.D] = 0;
  }
  return {scratch.rows, scratch.row, 1};
}

// ---- projections ----

template <typename E, typename T, typename W>
void pack_projection(const Pool<E, T, W>& p, int64_t panel) {
  using X = Operand<E, T, W>;
  constexpr int64_t n = kLanes<T>;
  const int64_t depth = operand_depth(p);
  X* to = static_cast<X*>(p.projections) + panel * depth * 2 * n;
  for (int64_t branch = 0; branch < 2; ++branch) {
    const Matrix<W>& weight = branch == 1 && p.branches == 2 ? p.u : p.v;
    const int64_t first = p.branches == 2 ? panel * n : (panel * 2 + branch) * n;
    const int64_t units = p.L - first < 0 ? 0 : p.L - first < n ? p.L - first : n;
    const W* from = weight.at + first * weight.row;
    if constexpr (sizeof(X) == 2) {  // [depth / 2, 2, n, 2]
      for (int64_t l = 0; l < n; ++l) {
        for (int64_t d = 0; d < depth; ++d) {
          to[((d / 2 * 2 + branch) * n + l) * 2 + d % 2] =
              l < units && d < p.D ? from[l * weight.row + d * weight.col] : 0;
        }
      }
    } else {
      if (units < n) {
        for (int64_t d = 0; d < depth; ++d) store(to + (d * 2 + branch) * n, Vec<T>{});
      }
      copy_matrix(Matrix<W>{from, weight.col, weight.row}, depth, units, to + branch * n, 2 * n);
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

// Calls use(m, sums) for every row m of the chunk with its two vectors of one panel, biases added.
template <int ROWS, typename X, typename T, typename F>
ERCN_INLINE void project_rows(Matrix<X> x, int64_t& m, int64_t rows, const X* panel, const T* bias, int64_t depth,
                              const F& use) {
  for (; m + ROWS <= rows; m += ROWS) {
    Vec<T> sum[ROWS][2];
    ERCN_UNROLL for (int r = 0; r < ROWS; ++r) {
      ERCN_UNROLL for (int v = 0; v < 2; ++v) sum[r][v] = load<Vec<T>>(bias + v * kLanes<T>);
    }
    project<ROWS>(Matrix<X>{x.at + m * x.row, x.row, 1}, panel, depth, sum);
    Vec<T> rested[ROWS][2];  // in memory, so that the loop below need not be unrolled
    ERCN_UNROLL for (int r = 0; r < ROWS; ++r) {
      ERCN_UNROLL for (int v = 0; v < 2; ++v) rested[r][v] = sum[r][v];
    }
#pragma GCC unroll 1
    for (int r = 0; r < ROWS; ++r) use(m + r, rested[r]);
  }
}

template <typename X, typename T, typename F>
ERCN_INLINE void project_chunk(Matrix<X> x, int64_t rows, const X* panel, const T* bias, int64_t depth, const F& use) {
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

// Random bits of kDropUnits hidden units from `unit` on, for the chunk's instances.
template <typename E, typename T, typename W>
__attribute__((noinline)) void draw(const Pool<E, T, W>& p, int64_t first, int64_t rows, int64_t unit,
                                    uint32_t* words) {
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t i = instance(p, first + m);
    ERCN_UNROLL for (int part = 0; part < 16; part += kWords) {
      Words out[4];
      philox(static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), unit / 4 + part, p.dropout->keys, out);
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

// ---- forward ----

// s[m, k] = w_k · gate(m) + b_k for every instance of the chunk.
template <bool GATED, typename E, typename T, typename W>
ERCN_INLINE void score_chunk(const Pool<E, T, W>& p, Matrix<Operand<E, T, W>> x, int64_t first_instance, int64_t rows,
                             const ChunkScratch<E, T, W>& scratch, T* scores) {
  using X = Operand<E, T, W>;
  constexpr int64_t n = kLanes<T>, units = GATED ? n : 2 * n;
  const int64_t depth = operand_depth(p);
  T* head_sums = scratch.head_sums;
  for (int64_t i = 0; i < rows * p.K; ++i) store(head_sums + i * n, Vec<T>{});
  for (int64_t panel = 0; panel < p.units / units; ++panel) {
    const int64_t first = panel * units;
    const bool partial = first + units > p.L;
    if (p.dropout && first % kDropUnits == 0) draw(p, first_instance, rows, first, scratch.words);
    project_chunk(
        x, rows, static_cast<const X*>(p.projections) + panel * depth * 2 * n, p.biases + panel * 2 * n, depth,
        [&](int64_t m, const Vec<T>(&sum)[2]) {
          Vec<T> gate[2], slope;
          ERCN_UNROLL for (int v = 0; v < units / n; ++v) {
            gate[v] = activate<false, T>(p.activation, sum[v], slope);
            if constexpr (GATED) gate[0] *= sigmoid(sum[1]);
            if (p.dropout) {
              const auto bits = bits_of(scratch.words + m * kDropUnits + (first + v * n) % kDropUnits, T{});
              gate[v] = kept(gate[v], bits, *p.dropout);
              if constexpr (GATED) gate[v] = kept(gate[v], bits >> 16, *p.dropout);
            }
            if (partial) gate[v] = existing<T>(gate[v], first + v * n, p.L);
            for (int64_t k = 0; k < p.K; ++k) {
              T* to = head_sums + (m * p.K + k) * n;
              store(to, load<Vec<T>>(to) + load<Vec<T>>(p.w + k * p.units + first + v * n) * gate[v]);
            }
          }
        });
  }
  for (int64_t i = 0; i < rows * p.K; ++i) scores[i] = sum_of<T>(load<Vec<T>>(head_sums + i * n)) + p.w_bias[i % p.K];
}

// Largest score of a segment's head, 0 if it is -Inf: exp(s - max) is then 0 and not NaN. NaN scores pass by.
template <typename T>
ERCN_INLINE T largest(const T* scores, int64_t rows, int64_t K, T& shift) {
  T most = -__builtin_inff();
  for (int64_t m = 0; m < rows; ++m) most = scores[m * K] > most ? scores[m * K] : most;
  shift = most == -__builtin_inff() ? 0 : most;
  return most;
}

// out[d] = Σ_m e[m · K] x[m, d]
template <typename X, typename T>
ERCN_INLINE void weighted_sum(const T* e, int64_t K, Matrix<X> x, int64_t rows, int64_t D, T* out) {
  constexpr int64_t n = kLanes<T>;
  int64_t d = 0;
  for (; d + 4 * n <= D; d += 4 * n) {
    Vec<T> sum[4] = {};
    for (int64_t m = 0; m < rows; ++m) {
      ERCN_UNROLL for (int v = 0; v < 4; ++v) sum[v] += e[m * K] * load_wide(x.at + m * x.row + d + v * n);
    }
    ERCN_UNROLL for (int v = 0; v < 4; ++v) store(out + d + v * n, sum[v]);
  }
  for (; d < D; ++d) {
    T sum = 0;
    for (int64_t m = 0; m < rows; ++m) sum += e[m * K] * wide(x.at[m * x.row + d]);
    out[d] = sum;
  }
}

// The parts of max, sum and pooled of a chunk's segments, whose instances begin at `first`. scores [rows, K] are lost.
template <typename E, typename T, typename W>
ERCN_INLINE void pool_chunk(const Pool<E, T, W>& p, int64_t begin, int64_t end, Matrix<Operand<E, T, W>> x, T* scores) {
  const int64_t first = p.segments[begin].first;
  for (int64_t s = begin; s < end; ++s) {
    const Segment& segment = p.segments[s];
    const int64_t skip = segment.first - first;
    for (int64_t k = 0; k < p.K; ++k) {
      T* e = scores + skip * p.K + k;
      T shift, sum = 0;
      p.part_max[s * p.K + k] = largest(e, segment.rows, p.K, shift);
      for (int64_t m = 0; m < segment.rows; ++m) sum += e[m * p.K] = exponential(e[m * p.K] - shift);
      p.part_sum[s * p.K + k] = sum;
      weighted_sum(e, p.K, Matrix<Operand<E, T, W>>{x.at + skip * x.row, x.row, 1}, segment.rows, p.D,
                   p.part_pooled + (s * p.K + k) * p.D);
    }
  }
}

template <typename E, typename T, typename W>
ERCN_INLINE T& score_of(const Pool<E, T, W>& p, int64_t i, int64_t k) {
  return p.scores[i / p.N * p.K * p.N + k * p.N + i % p.N];
}

template <typename E, typename T, typename W>
void forward(const Pool<E, T, W>& p, int64_t begin, int64_t end, void* memory) {
  const ChunkScratch<E, T, W> scratch(p, memory);
  const int64_t first = p.segments[begin].first, rows = p.segments[end - 1].first + p.segments[end - 1].rows - first;
  const auto x = operand(p, first, rows, scratch);
  T* scores = scratch.attention;
  if (p.branches == 2) {
    score_chunk<true>(p, x, first, rows, scratch, scores);
  } else {
    score_chunk<false>(p, x, first, rows, scratch, scores);
  }
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t i = instance(p, first + m);
    for (int64_t k = 0; k < p.K; ++k) score_of(p, i, k) = scores[m * p.K + k];
  }
  if (p.part_pooled) pool_chunk(p, begin, end, x, scores);
}

template <typename E, typename T, typename W>
void pool(const Pool<E, T, W>& p, int64_t begin, int64_t end, void* memory) {
  const ChunkScratch<E, T, W> scratch(p, memory);
  const int64_t first = p.segments[begin].first, rows = p.segments[end - 1].first + p.segments[end - 1].rows - first;
  T* scores = scratch.attention;
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t i = instance(p, first + m);
    for (int64_t k = 0; k < p.K; ++k) scores[m * p.K + k] = score_of(p, i, k);
  }
  pool_chunk(p, begin, end, operand(p, first, rows, scratch), scores);
}

// ---- backward ----

template <typename T>
ERCN_INLINE int64_t padded_columns(int64_t D) {
  return (D + kColumns<T> - 1) / kColumns<T> * kColumns<T>;
}

template <typename X, typename T>
ERCN_INLINE T dot(const X* x, const T* y, int64_t D) {
  constexpr int64_t n = kLanes<T>;
  Vec<T> sum[4] = {};
  int64_t d = 0;
  for (; d + 4 * n <= D; d += 4 * n) {
    ERCN_UNROLL for (int v = 0; v < 4; ++v) sum[v] += load_wide(x + d + v * n) * load<Vec<T>>(y + d + v * n);
  }
  T total = sum_of<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; d < D; ++d) total += wide(x[d]) * y[d];
  return total;
}

template <typename E, typename T, typename W>
void dots(const Pool<E, T, W>& p, int64_t begin, int64_t end, void* memory) {
  const ChunkScratch<E, T, W> scratch(p, memory);
  const int64_t columns = padded_columns<T>(p.D);
  const int64_t start = p.segments[begin].first, rows = p.segments[end - 1].first + p.segments[end - 1].rows - start;
  Matrix<Operand<E, T, W>> x{};
  if (p.dots) x = operand(p, start, rows, scratch);
  for (int64_t s = begin; s < end; ++s) {
    const auto [first, count, bag] = p.segments[s];
    for (int64_t k = 0; k < p.K; ++k) {
      T* e = scratch.attention;
      for (int64_t m = 0; m < count; ++m) e[m] = score_of(p, instance(p, first + m), k);
      T shift;
      double sum = 0, sum_dot = 0;  // what is wrong with Σ a (ĝ·h) is wrong with every instance alike, and adds up
      p.part_max[s * p.K + k] = largest(e, count, 1, shift);
      for (int64_t m = 0; m < count; ++m) {
        const T weight = exponential(e[m] - shift);
        p.attention[(first + m) * p.K + k] = weight;
        sum += weight;
        if (!p.dots) continue;
        const T product = dot(x.at + (first - start + m) * x.row, p.grad_pooled + (bag * p.K + k) * columns, p.D);
        p.dots[(first + m) * p.K + k] = product;
        sum_dot += weight * product;
      }
      p.part_sum[s * p.K + k] = static_cast<T>(sum);
      p.part_dot[s * p.K + k] = static_cast<T>(sum_dot);
    }
  }
}

template <typename E, typename T, typename W>
ERCN_INLINE T* dp_at(const Pool<E, T, W>& p, int64_t branch, int64_t unit, int64_t row) {
  const int64_t u = branch * p.units + unit;
  return p.dp + u / kDpUnits * p.dp_block + row * kDpUnits + u % kDpUnits;
}

template <typename E, typename T, typename W>
ERCN_INLINE void store_dp(const Pool<E, T, W>& p, int64_t branch, int64_t unit, int64_t row, Vec<T> x) {
  constexpr int64_t side = kLanes<T> < kDpUnits ? kLanes<T> : kDpUnits;
  Vec<T, side * sizeof(T)> parts[kLanes<T> / side];
  __builtin_memcpy(parts, &x, sizeof x);
  ERCN_UNROLL for (int i = 0; i < kLanes<T> / side; ++i) store(dp_at(p, branch, unit + i * side, row), parts[i]);
}

// dp from row dp_row on, and the chunk's sums for the biases and w, from ds [rows, K].
template <bool GATED, typename E, typename T, typename W>
ERCN_INLINE void project_backward(const Pool<E, T, W>& p, Matrix<Operand<E, T, W>> x, int64_t first_instance,
                                  int64_t rows, const T* ds, int64_t dp_row, uint32_t* words, T* parts) {
  using X = Operand<E, T, W>;
  constexpr int64_t n = kLanes<T>, units = GATED ? n : 2 * n;
  const int64_t depth = operand_depth(p);
  for (int64_t i = 0; i < (2 + p.K) * p.units; i += n) store(parts + i, Vec<T>{});
  T *sum_v = parts, *sum_u = parts + p.units, *sum_w = parts + 2 * p.units;
  const auto add = [](T* to, Vec<T> x) { store(to, load<Vec<T>>(to) + x); };
  for (int64_t panel = 0; panel < p.units / units; ++panel) {
    const int64_t first = panel * units;
    const bool partial = first + units > p.L;
    if (p.dropout && first % kDropUnits == 0) draw(p, first_instance, rows, first, words);
    project_chunk(
        x, rows, static_cast<const X*>(p.projections) + panel * depth * 2 * n, p.biases + panel * 2 * n, depth,
        [&](int64_t m, const Vec<T>(&sum)[2]) {
          ERCN_UNROLL for (int v = 0; v < units / n; ++v) {
            const int64_t unit = first + v * n;
            Vec<T> slope, t = activate<true, T>(p.activation, sum[v], slope), s = {}, rest = {};
            if constexpr (GATED) s = sigmoid(sum[1]), rest = 1 - s;
            if (p.dropout) {
              const auto bits = bits_of(words + m * kDropUnits + unit % kDropUnits, T{});
              t = kept(t, bits, *p.dropout), slope = kept(slope, bits, *p.dropout);
              if constexpr (GATED) s = kept(s, bits >> 16, *p.dropout);
            }
            if (partial) t = existing<T>(t, unit, p.L), slope = existing<T>(slope, unit, p.L);
            if (GATED && partial) s = existing<T>(s, unit, p.L), rest = existing<T>(rest, unit, p.L);
            const Vec<T> gate = GATED ? t * s : t;
            Vec<T> dgate = {};
            for (int64_t k = 0; k < p.K; ++k) {
              const T scale = ds[m * p.K + k];
              dgate += scale * load<Vec<T>>(p.w + k * p.units + unit);
              add(sum_w + k * p.units + unit, scale * gate);
            }
            if (partial) dgate = existing<T>(dgate, unit, p.L);
            const Vec<T> dt = (GATED ? dgate * s : dgate) * slope;
            store_dp(p, 0, unit, dp_row + m, dt);
            add(sum_v + unit, dt);
            if constexpr (GATED) {
              const Vec<T> du = dgate * gate * rest;
              store_dp(p, 1, unit, dp_row + m, du);
              add(sum_u + unit, du);
            }
          }
        });
  }
}

template <typename E, typename T, typename W>
void pack_columns(const Pool<E, T, W>& p, int64_t panel) {
  constexpr int64_t n = kColumns<T>;
  const int64_t d = panel * n, columns = p.D - d < n ? p.D - d : n;
  T* to = p.columns + panel * p.branches * p.units * n;
  for (int64_t branch = 0; branch < p.branches; ++branch) {
    const Matrix<W>& weight = branch ? p.u : p.v;
    T* rows = to + branch * p.units * n;
    if (columns < n || p.L < p.units) {
      for (int64_t i = 0; i < p.units * n; i += kLanes<T>) store(rows + i, Vec<T>{});
    }
    copy_matrix(Matrix<W>{weight.at + d * weight.col, weight.row, weight.col}, p.L, columns, rows, n);
  }
}

// grad_h[m] = dp[m] [V; U] + Σ_k a[m, k] ĝ_k, ĝ of m's bag at grads[m].
template <int ROWS, typename E, typename T, typename W>
ERCN_INLINE void input_rows(const Pool<E, T, W>& p, int64_t& m, int64_t rows, int64_t panel, int64_t dp_row, const T* a,
                            const T* const* grads, E* const* to) {
  constexpr int64_t n = kColumns<T>, lanes = kLanes<T>;
  const int64_t d = panel * n, columns = p.D - d < n ? p.D - d : n, depth = p.branches * p.units;
  const T* weights = p.columns + panel * depth * n;
  for (; m + ROWS <= rows; m += ROWS) {
    Vec<T> sum[ROWS][kVecs] = {};
    for (int64_t u = 0; u < depth; u += kDpUnits) {
      tile_product<ROWS, kVecs>(dp_at(p, 0, u, dp_row + m), kDpUnits, 1, weights + u * n, n, kDpUnits, sum);
    }
    T rested[ROWS][n];
    ERCN_UNROLL for (int r = 0; r < ROWS; ++r) {
      ERCN_UNROLL for (int v = 0; v < kVecs; ++v) store(rested[r] + v * lanes, sum[r][v]);
    }
#pragma GCC unroll 1
    for (int r = 0; r < ROWS; ++r) {
      if (p.grad_pooled) {
        for (int64_t k = 0; k < p.K; ++k) {
          ERCN_UNROLL for (int v = 0; v < kVecs; ++v) {
            T* at = rested[r] + v * lanes;
            store(at, load<Vec<T>>(at) + a[(m + r) * p.K + k] *
                                             load<Vec<T>>(grads[m + r] + k * padded_columns<T>(p.D) + d + v * lanes));
          }
        }
      }
      E* out = to[m + r] + d;
      if (columns == n) {
        for (int64_t c = 0; c < n; ++c) put(out + c, rested[r][c]);
      } else {
        for (int64_t c = 0; c < columns; ++c) put(out + c, rested[r][c]);
      }
    }
  }
}

template <typename E, typename T, typename W>
void backward(const Pool<E, T, W>& p, int64_t begin, int64_t end, int64_t dp_first, int64_t part, void* memory) {
  const ChunkScratch<E, T, W> scratch(p, memory);
  const int64_t start = p.segments[begin].first, rows = p.segments[end - 1].first + p.segments[end - 1].rows - start;
  const auto x = operand(p, start, rows, scratch);
  T *ds = scratch.grad_scores, *a = p.attention + start * p.K;
  T* parts = p.part_grads + part * ((2 + p.K) * p.units + p.K);
  const T* grads[kMaxChunk];
  E* to[kMaxChunk];
  for (int64_t s = begin; s < end; ++s) {
    const auto [first, count, bag] = p.segments[s];
    for (int64_t r = first; r < first + count; ++r) {
      const int64_t i = instance(p, r), m = r - start;
      grads[m] = p.grad_pooled ? p.grad_pooled + bag * p.K * padded_columns<T>(p.D) : nullptr;
      to[m] = p.grad_h ? p.grad_h + i * p.D : nullptr;
      for (int64_t k = 0; k < p.K; ++k) {
        T sum = 0;
        if (p.grad_pooled) {
          a[m * p.K + k] *= p.part_scale[s * p.K + k];
          sum = a[m * p.K + k] * (p.dots[r * p.K + k] - p.bag_dot[bag * p.K + k]);
        }
        if (p.grad_scores) {
          sum += p.grad_scores[i / p.N * p.grad_scores_b + k * p.grad_scores_k + i % p.N * p.grad_scores_n];
        }
        ds[m * p.K + k] = sum;
      }
    }
  }
  for (int64_t k = 0; k < p.K; ++k) {
    double sum = 0;
    for (int64_t m = 0; m < rows; ++m) sum += ds[m * p.K + k];
    parts[(2 + p.K) * p.units + k] = static_cast<T>(sum);
  }
  if (p.branches == 2) {
    project_backward<true>(p, x, start, rows, ds, start - dp_first, scratch.words, parts);
  } else {
    project_backward<false>(p, x, start, rows, ds, start - dp_first, scratch.words, parts);
  }
  if (!p.grad_h) return;
  for (int64_t panel = 0; panel < padded_columns<T>(p.D) / kColumns<T>; ++panel) {
    int64_t m = 0;
    input_rows<kRows>(p, m, rows, panel, start - dp_first, a, grads, to);
    input_rows<kRows / 2>(p, m, rows, panel, start - dp_first, a, grads, to);
    input_rows<1>(p, m, rows, panel, start - dp_first, a, grads, to);
  }
}

template <typename E, typename T, typename W>
void pool_backward(const Pool<E, T, W>& p, int64_t begin, int64_t end) {
  constexpr int64_t n = kLanes<T>;
  const int64_t columns = padded_columns<T>(p.D);
  for (int64_t s = begin; s < end; ++s) {
    const auto [first, count, bag] = p.segments[s];
    for (int64_t r = first; r < first + count; ++r) {
      const int64_t i = instance(p, r);
      T* a = p.attention + r * p.K;
      for (int64_t k = 0; k < p.K; ++k) {
        a[k] *= p.part_scale[s * p.K + k];
        if (!p.scores_grad) continue;
        p.scores_grad[i / p.N * p.K * p.N + k * p.N + i % p.N] =
            a[k] * (p.dots[r * p.K + k] - p.bag_dot[bag * p.K + k]);
      }
      if (!p.grad_h) continue;
      const T* grads = p.grad_pooled + bag * p.K * columns;
      E* to = p.grad_h + i * p.D;
      for (int64_t d = 0; d < p.D; d += n) {
        Vec<T> sum = {};
        for (int64_t k = 0; k < p.K; ++k) sum += a[k] * load<Vec<T>>(grads + k * columns + d);
        T rested[n];
        store(rested, sum);
        const int64_t wide = p.D - d < n ? p.D - d : n;
        for (int64_t c = 0; c < wide; ++c) put(to + d + c, rested[c]);
      }
    }
  }
}

// Columns of a block of h, and its row, which a cache line keeps from being a power of two.
template <typename T>
constexpr int64_t kGroupColumns = kPanelGroup* kColumns<T>;
template <typename T>
constexpr int64_t kGroupRow = kGroupColumns<T> + 64 / sizeof(T);

template <typename E, typename T, typename W>
void weight(const Pool<E, T, W>& p, int64_t first, int64_t rows, int64_t branch, int64_t unit, int64_t panel, T* grad,
            T* scratch) {
  constexpr int64_t n = kColumns<T>, row = kGroupRow<T>;
  const int64_t units = p.units - unit < kUnitGroup ? p.units - unit : kUnitGroup;
  const int64_t d = panel * n, columns = p.D - d < kGroupColumns<T> ? p.D - d : kGroupColumns<T>;
  T *sum = scratch, *h = scratch + kUnitGroup * row;  // [unit, row], [instance of a slice, row]
  for (int64_t i = 0; i < units * row; i += kLanes<T>) store(sum + i, Vec<T>{});
  if (columns % n) {
    for (int64_t i = 0; i < kSlice * row; i += kLanes<T>) store(h + i, Vec<T>{});
  }
  for (int64_t r = 0; r < rows; r += kSlice) {
    const int64_t depth = rows - r < kSlice ? rows - r : kSlice;
    gather(p, first + r, depth, d, columns, h, row);
    for (int64_t c = 0; c < columns; c += n) {
      for (int64_t m = 0; m < units; m += kRows) {
        tile_add_product<kRows, kVecs, Vec<T>>(
            dp_at(p, branch, unit + m, r), 1, kDpUnits, h + c, row, depth, sum + m * row + c, row);
      }
    }
  }
  for (int64_t l = 0; l < units && unit + l < p.L; ++l) {
    T* to = grad + (unit + l) * p.D + d;
    for (int64_t c = 0; c < columns; ++c) to[c] += sum[l * row + c];
  }
}

template <typename E, typename T, typename W>
PoolKernel<E, T, W> pool_kernel() {
  return {
      kLanes<T>,
      kColumns<T>,
      sizeof(Operand<E, T, W>),
      pack_projection<E, T, W>,
      pack_columns<E, T, W>,
      chunk_scratch<E, T, W>,
      forward<E, T, W>,
      pool<E, T, W>,
      dots<E, T, W>,
      backward<E, T, W>,
      pool_backward<E, T, W>,
      (kUnitGroup + kSlice) * kGroupRow<T>,
      weight<E, T, W>,
  };
}

}  // namespace ercn::ERCN_ISA
