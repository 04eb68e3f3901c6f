#pragma once
// One block of columns of Y = V · relu(FᵀF) and of its gradients. Everything here is inlined into one function per
// instruction set (relu_affinity.cpp), so the same lines compile to SSE2, AVX2 or NEON.
#include <cstdint>
#include <cstring>

#define ERCN_INLINE inline __attribute__((always_inline))

namespace ercn {

constexpr int64_t kBlock = 64;   // columns of a panel: a T tile of fp32 is 16 KiB
constexpr int64_t kRows = 4;     // rows of a register tile
constexpr int kVecBytes = 32;

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVecBytes), aligned(alignof(T)), may_alias));  // reads from any T*
  static constexpr int64_t lanes = kVecBytes / sizeof(T);
};

// out[ROWS, VECS*lanes] += Σ_k a(m, k) · b[k, :], with a(m, k) = a[m * a_row + k * a_col] and rows of b and out kBlock
// apart. The sum over k is formed in registers before it is added, so that long sums are sums of short ones.
template <typename T, int64_t ROWS, int64_t VECS>
ERCN_INLINE void register_tile(const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t depth, T* out) {
  using Vec = typename VecOf<T>::type;
  Vec sum[ROWS][VECS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec* row = reinterpret_cast<const Vec*>(b + k * kBlock);
    for (int64_t m = 0; m < ROWS; ++m) {
      const T scale = a[m * a_row + k * a_col];
      for (int64_t v = 0; v < VECS; ++v) sum[m][v] += scale * row[v];
    }
  }
  for (int64_t m = 0; m < ROWS; ++m) {
    Vec* row = reinterpret_cast<Vec*>(out + m * kBlock);
    for (int64_t v = 0; v < VECS; ++v) row[v] += sum[m][v];
  }
}

// out[rows, kBlock] += a[rows, depth] · b[depth, kBlock]
template <typename T>
ERCN_INLINE void multiply_add(
    const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t rows, int64_t depth, T* out) {
  constexpr int64_t lanes = VecOf<T>::lanes;
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) {
    for (int64_t n = 0; n < kBlock; n += 2 * lanes) {
      register_tile<T, kRows, 2>(a + m * a_row, a_row, a_col, b + n, depth, out + m * kBlock + n);
    }
  }
  for (; m < rows; ++m) {
    for (int64_t n = 0; n < kBlock; n += 8 * lanes) {
      register_tile<T, 1, 8>(a + m * a_row, a_row, a_col, b + n, depth, out + m * kBlock + n);
    }
  }
}

// Panels of one image: [blocks, D or C, kBlock], the last one padded with zeros.
template <typename T>
struct Panels {
  const T* feat;       // F
  const T* rows;       // V in forward, G in backward: what A multiplies
  const T* value;      // V in backward, unused in forward
  int64_t C, D, N;
};

// Columns [block * kBlock, …) of
//   out_rows [C, kBlock] = rows · A,  A = relu(T), T = FᵀF
//   out_feat [D, kBlock] = F · W,     W = 1[T > 0] ⊙ (VᵀG + GᵀV)
// A null output is left out. Both must hold zeros. Sums run over row blocks in ascending order: the result does not
// depend on threads. Padding is never summed over (0 · NaN), it only ends in columns that are not stored.
template <typename T>
ERCN_INLINE void affinity_block(const Panels<T>& p, int64_t block, T* out_rows, T* out_feat) {
  alignas(64) T tile[kBlock * kBlock];
  alignas(64) T weight[kBlock * kBlock];
  const T* feat_j = p.feat + block * p.D * kBlock;
  for (int64_t i0 = 0; i0 < p.N; i0 += kBlock) {
    const int64_t rows = p.N - i0 < kBlock ? p.N - i0 : kBlock;
    const T* feat_i = p.feat + i0 * p.D;
    std::memset(tile, 0, sizeof(tile));
    multiply_add(feat_i, 1, kBlock, feat_j, rows, p.D, tile);
    if (out_feat) {
      const int64_t at_j = block * p.C * kBlock;
      std::memset(weight, 0, sizeof(weight));
      multiply_add(p.value + i0 * p.C, 1, kBlock, p.rows + at_j, rows, p.C, weight);
      multiply_add(p.rows + i0 * p.C, 1, kBlock, p.value + at_j, rows, p.C, weight);
      // NaN passes, as in torch's threshold_backward.
      for (int64_t k = 0; k < rows * kBlock; ++k) weight[k] = tile[k] <= 0 ? T(0) : weight[k];
      multiply_add(feat_i, kBlock, 1, weight, p.D, rows, out_feat);
    }
    if (out_rows) {
      for (int64_t k = 0; k < rows * kBlock; ++k) tile[k] = tile[k] <= 0 ? T(0) : tile[k];
      multiply_add(p.rows + i0 * p.C, kBlock, 1, tile, p.C, rows, out_rows);
    }
  }
}

}  // namespace ercn
