#pragma once
// Tiles of rows of 128 bytes in shared memory: where an element lies, how they are filled, and T = FᵀF of a warp.
#include <arch/async.h>
#include <arch/mma.h>

#include "affinity/generic/tiles.h"
#include "terms.h"

namespace ercn::affinity {

using arch::swizzled;

// The unit of tiles of fp32 of which 4 rows are read at a time, 32 bytes of each. Others have 16 bytes, for ldmatrix or
// words of neighbouring rows.
constexpr int kPairs = 32;

// Starts the copy of ROWS rows of 128 bytes, `stride` bytes apart in device memory.
template <int ROWS, int UNIT = 16>
ERCN_DEVICE void copy_rows(unsigned char* tile, const unsigned char* from, int64_t stride) {
  constexpr int kAtOnce = kThreads / 8;  // rows; a multiple of what the swizzle repeats after
  static_assert(ROWS % kAtOnce == 0 && kAtOnce % 8 == 0);
  const int row = arch::thread_index() / 8, byte = arch::thread_index() % 8 * 16;
  tile += swizzled<UNIT>(row, byte);
  from += row * stride + byte;
#pragma unroll
  for (int i = 0; i < ROWS / kAtOnce; ++i) {
    arch::cp_async(tile + i * kAtOnce * kRowBytes, from + i * kAtOnce * stride);
  }
}

// Fragment A of 16 rows from `row` on, and B of 16 columns of T (two 8-column tiles), of 32 bytes at `step`.
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

// t += F_iᵀF_j over one chunk of features: 16·M rows of `rows` from `row` on, 8·N rows of `columns`.
template <typename Precision, int M, int N>
ERCN_DEVICE void add_product(float (&t)[M][N][4], const unsigned char* rows, int row, const unsigned char* columns) {
  using Product = typename Precision::Product;
  constexpr int kUnroll = Precision::kExact ? 1 : kRowBytes / 32;  // terms take registers enough
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

// relu, which lets NaN through; 0 for columns from `left` on.
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

// The accumulators of 8 columns of a product as the 8 columns of A of a TF32 product: column 2 t of it is k = t, and
// 2 t + 1 is k = t + 4, in which order B is read too.
ERCN_DEVICE void as_factor(float (&a)[4], const float (&d)[4]) { a[0] = d[0], a[1] = d[2], a[2] = d[1], a[3] = d[3]; }

}  // namespace ercn::affinity
