#pragma once
// Vectors and the register tile of every kernel. Only the kernels_<isa>.cpp files include it: ERCN_ISA names their
// namespace, the macros below choose sizes, and everything is inlined into their functions.
#include <cstdint>

#define ERCN_INLINE inline __attribute__((always_inline))
#define ERCN_UNROLL _Pragma("GCC unroll 32")

namespace ercn::ERCN_ISA {

#if defined(ERCN_AVX512)
constexpr int kVecBytes = 64;
#elif defined(ERCN_AVX2)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <typename T, int BYTES>
struct VecOf {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <typename T, int BYTES = kVecBytes>
using Vec = typename VecOf<T, BYTES>::type;

template <typename V, typename T>
ERCN_INLINE V load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);  // any alignment
  return v;
}
template <typename V, typename T>
ERCN_INLINE void store(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// A vector of UNIT elements repeated: one number, or the 64 bits of two.
template <typename V, int UNIT, typename T>
ERCN_INLINE auto splat(const T* from) {
  if constexpr (UNIT == 1) {
    return *from;  // an operation with a vector widens it
  } else {
    static_assert(UNIT * sizeof(T) == sizeof(int64_t));
    int64_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return (V)(Vec<int64_t, sizeof(V)>{} + bits);
  }
}

// sum[m][v] += Σ_k a[m * a_row + k * a_col] · b[k * b_row + v * lanes]: ROWS broadcasts times VECS vectors, all in
// registers. ROWS * VECS sums hide the latency of the fused multiply-add. With UNIT 2 pairs of neighbours of a meet
// pairs of b: a lane has every other term of a sum.
template <int ROWS, int VECS, int UNIT = 1, typename V, typename T>
ERCN_INLINE void tile_product(
    const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, int64_t depth, V (&sum)[ROWS][VECS]) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  for (int64_t k = 0; k < depth; ++k) {
    V row[VECS];
    ERCN_UNROLL for (int v = 0; v < VECS; ++v) row[v] = load<V>(b + k * b_row + v * lanes);
    ERCN_UNROLL for (int m = 0; m < ROWS; ++m) {
      const auto scale = splat<V, UNIT>(a + m * a_row + k * a_col);
      ERCN_UNROLL for (int v = 0; v < VECS; ++v) sum[m][v] += scale * row[v];
    }
  }
}

// out[m * out_row + …] += that product. The sum over k is formed in registers first: a long sum is a sum of short ones.
template <int ROWS, int VECS, typename V, int UNIT = 1, typename T>
ERCN_INLINE void tile_add_product(
    const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, int64_t depth, T* out, int64_t out_row) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V sum[ROWS][VECS] = {};
  tile_product<ROWS, VECS, UNIT>(a, a_row, a_col, b, b_row, depth, sum);
  ERCN_UNROLL for (int m = 0; m < ROWS; ++m) {
    ERCN_UNROLL for (int v = 0; v < VECS; ++v) {
      T* to = out + m * out_row + v * lanes;
      store(to, load<V>(to) + sum[m][v]);
    }
  }
}

// Rows and vectors of the register tile that runs at the machine's peak.
constexpr int kRows = kVecBytes == 64 ? 8 : 4, kVecs = kVecBytes == 32 ? 3 : 2;

}  // namespace ercn::ERCN_ISA
