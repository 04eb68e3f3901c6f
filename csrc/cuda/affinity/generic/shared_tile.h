#pragma once
// Swizzled tiles in shared memory: their copies, their fragments, and a warp's T = FᵀF.
#include <arch/async.h>
#include <arch/mma.h>

#include "affinity/generic/tiles.h"
#include <arch/terms.h>

namespace ercn::affinity {

using arch::swizzled;

// The swizzle's unit in tiles of fp32 pairs, whose reads take 32 bytes of each of 4 rows. Others have 16 bytes, for
// ldmatrix or words of neighbouring rows.
constexpr int kPairs = 32;

// Starts the copy of ROWS rows of 128 bytes, `stride` bytes apart in device memory.
template <int ROWS, int UNIT = 16>
ERCN_DEVICE void copy_rows(unsigned char* tile, const unsigned char* from, int64_t stride) {
  constexpr int kAtOnce = kThreads / 8;  // rows; the swizzle repeats after 8
  static_assert(ROWS % kAtOnce == 0 && kAtOnce % 8 == 0);
  const int row = arch::thread_index() / 8, byte = arch::thread_index() % 8 * 16;
  tile += swizzled<UNIT>(row, byte);
  from += row * stride + byte;
#pragma unroll
  for (int i = 0; i < ROWS / kAtOnce; ++i) {
    arch::cp_async(tile + i * kAtOnce * kRowBytes, from + i * kAtOnce * stride);
  }
}

// Fragments of the 32 bytes at `step`: A of 16 rows from `row` on, B of 16 columns of T, in two tiles of 8.
ERCN_DEVICE void load_a(uint32_t (&a)[4], const unsigned char* tile, int row, int step) {
  const int lane = arch::lane_index();
  arch::ldmatrix(a, tile + swizzled(row + lane % 16, step * 32 + lane / 16 * 16));
}
ERCN_DEVICE void load_b(uint32_t (&b)[2][2], const unsigned char* tile, int row, int step) {
  const int lane = arch::lane_index();
  uint32_t r[4];
  arch::ldmatrix(r, tile + swizzled(row + lane % 8 + lane / 16 * 8, step * 32 + lane / 8 % 2 * 16));
  for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = r[i];
}

// t += F_iᵀF_j of one slab: 16·M rows of `rows` from `row` on, 8·N rows of `columns`.
template <typename Precision, int M, int N>
ERCN_DEVICE void add_product(float (&t)[M][N][4], const unsigned char* rows, int row, const unsigned char* columns) {
  using Product = typename Precision::Product;
  constexpr int kUnroll = Precision::kExact ? 1 : kRowBytes / 32;  // terms leave no registers for more
#pragma unroll kUnroll
  for (int step = 0; step < kRowBytes / 32; ++step) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_a(a[m], rows, row + 16 * m, step);
    if constexpr (Precision::kExact) {
      Terms<4> fa[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        for (int i = 0; i < 4; ++i) fa[m].set(i, arch::float_of(a[m][i]));
      }
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t b[2][2];
        load_b(b, columns, 8 * n, step);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Terms<2> fb;
          for (int i = 0; i < 2; ++i) fb.set(i, arch::float_of(b[half][i]));
#pragma unroll
          for (int m = 0; m < M; ++m) mma_terms(t[m][n + half], fa[m], fb);
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t b[2][2];
        load_b(b, columns, 8 * n, step);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int m = 0; m < M; ++m) arch::mma<Product>(t[m][n + half], a[m], b[half]);
        }
      }
    }
  }
}

// relu, NaN included; 0 for columns from `left` on.
template <int M, int N>
ERCN_DEVICE void rectify(float (&t)[M][N][4], int64_t left) {
  const int column = arch::lane_index() % 4 * 2;
  const bool whole = left >= 8 * N;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool zero = t[m][n][i] <= 0.0f || (!whole && 8 * n + column + i % 2 >= left);
        t[m][n][i] = zero ? 0.0f : t[m][n][i];
      }
    }
  }
}

// Accumulators of 8 columns as fragment A of a TF32 product: column 2 t becomes k = t, and 2 t + 1 becomes k = t + 4. B
// is read in the same order.
ERCN_DEVICE void as_factor(float (&a)[4], const float (&d)[4]) { a[0] = d[0], a[1] = d[2], a[2] = d[1], a[3] = d[3]; }

}  // namespace ercn::affinity
