#pragma once
// Elements and rows of instances as the pool's products take them.
// Channels are not padded where h is read: 0 · Inf = NaN.
#include <utility>

#include "../simd.h"
#include "pool.h"

namespace ercn::ERCN_ISA {

template <typename T>
constexpr int64_t kLanes = kVecBytes / sizeof(T);
template <typename T>
constexpr int64_t kStripChannels = kVecs * kLanes<T>;

// The element of h and the weights in the projections: bfloat16 where both hold it and the instruction set multiplies
// it, otherwise T.
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

template <typename E>
ERCN_INLINE int64_t instance(const Instances<E>& in, int64_t r) {
  return in.real ? in.real[r] : r;
}

// Where scores [B, K, N] or [K, N] have head k of instance i.
template <typename E>
ERCN_INLINE int64_t score_at(const Instances<E>& in, int64_t i, int64_t k) {
  return i / in.N * in.K * in.N + k * in.N + i % in.N;
}

template <typename E>
ERCN_INLINE const E* row_of(const Instances<E>& in, int64_t i) {
  return in.h + i / in.N * in.stride_b + i % in.N * in.stride_n;
}

// How many of the instances from r on, at most `limit`, lie one stride_n apart.
template <typename E>
ERCN_INLINE int64_t run_length(const Instances<E>& in, int64_t r, int64_t limit) {
  const int64_t i = instance(in, r);
  const bool flat = in.stride_b == in.N * in.stride_n;
  int64_t end = flat || in.N - i % in.N > limit ? limit : in.N - i % in.N;
  if (in.real) {
    int64_t n = 1;
    while (n < end && in.real[r + n] == i + n) ++n;
    end = n;
  }
  return end;
}

// Channels [d, d + columns) of instances [r, r + rows).
template <typename E, typename To>
ERCN_INLINE void gather(
    const Instances<E>& in, int64_t r, int64_t rows, int64_t d, int64_t columns, To* to, int64_t to_row) {
  for (int64_t n = 0; n < rows;) {
    const int64_t run = run_length(in, r + n, rows - n);
    const E* from = row_of(in, instance(in, r + n)) + d * in.stride_d;
    copy_matrix(Matrix<E>{from, in.stride_n, in.stride_d}, run, columns, to + n * to_row, to_row);
    n += run;
  }
}

template <typename X>
ERCN_INLINE int64_t operand_depth(int64_t D) {  // bfloat16 is multiplied in pairs
  return sizeof(X) == 2 ? (D + 1) / 2 * 2 : D;
}

// Scratch of one block, cut in pieces. X: the operand.
template <typename X, typename T>
struct BlockScratch {
  T *head_sums, *attention, *grad_scores;  // [rows, K, lanes], [rows, K] twice
  uint32_t* words;                         // [rows, kDropUnits] random bits, with dropout
  X* rows;                                 // [rows, row], if h is not used where it lies
  int64_t row, bytes;

  ERCN_INLINE BlockScratch(int64_t D, int64_t K, bool dropout, void* memory) {
    // One cache line more than a multiple of 4 KiB: rows must not share their place in the cache.
    row = (D + 63) / 64 * 64 + 64 / sizeof(X);
    head_sums = static_cast<T*>(memory);
    attention = head_sums + kMaxBlockRows * K * kLanes<T>;
    grad_scores = attention + kMaxBlockRows * K;
    words = reinterpret_cast<uint32_t*>(grad_scores + kMaxBlockRows * K);
    rows = reinterpret_cast<X*>(words + (dropout ? kMaxBlockRows * kDropUnits : 0));
    bytes = reinterpret_cast<char*>(rows + kMaxBlockRows * row) - static_cast<char*>(memory);
  }
};

template <typename X, typename T>
int64_t block_scratch(int64_t D, int64_t K, bool dropout) {
  return BlockScratch<X, T>(D, K, dropout, nullptr).bytes;
}

// Instances [r, r + rows) with channels side by side: in place where they lie so, otherwise copied.
template <typename E, typename X, typename T>
ERCN_INLINE Matrix<X> operand(const Instances<E>& in, int64_t r, int64_t rows, const BlockScratch<X, T>& scratch) {
  const int64_t depth = operand_depth<X>(in.D);
  if constexpr (sizeof(X) == sizeof(E)) {
    if (in.stride_d == 1 && in.D == depth && run_length(in, r, rows) == rows) {
      return {reinterpret_cast<const X*>(row_of(in, instance(in, r))), in.stride_n, 1};
    }
  }
  gather(in, r, rows, 0, in.D, scratch.rows, scratch.row);
  if (depth > in.D) {
    for (int64_t n = 0; n < rows; ++n) scratch.rows[n * scratch.row + in.D] = 0;
  }
  return {scratch.rows, scratch.row, 1};
}

}  // namespace ercn::ERCN_ISA
