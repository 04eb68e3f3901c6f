#pragma once
// Packs tensors [B, R, N] of any strides into the layouts of AffinityImage, and unpacks them, by blocks of pixels.
#include <algorithm>
#include <cstdint>

#include "../convert.h"
#include "../tasks.h"

namespace ercn {

// Pixels [n0, n0 + count) of image b, one block of it.
struct Block {
  int64_t b, n0, count;
};

template <typename F>
void for_each_block(int64_t B, int64_t N, const F& body) {
  const int64_t blocks = round_up(N, kBlock) / kBlock;
  for_each_task(B * blocks, [&](int64_t task, int64_t) {
    const int64_t n0 = task % blocks * kBlock;
    body(Block{task / blocks, n0, std::min(kBlock, N - n0)});
  });
}

// Element (b, 0, n0) of a tensor [B, R, N].
template <typename T>
const T* at(const Tensor& tensor, const Block& block) {
  return static_cast<const T*>(tensor.const_data_ptr()) + block.b * tensor.stride(0) + block.n0 * tensor.stride(2);
}

constexpr int64_t kRowsAhead = 16;  // how far the prefetched row lies before the packed one

// A block of source [B, R, N] -> [kBlock / panel, rows / SIDE, panel, SIDE]: SIDE rows of a pixel lie side by side.
// Padding pixels and rows become zeros.
template <typename From, int SIDE = 1, typename E>
void pack_panels(const Tensor& source, const Block& block, E* to, int64_t rows, int64_t panel) {
  const int64_t R = source.size(1), stride_r = source.stride(1), stride_n = source.stride(2);
  const From* from = at<From>(source, block);
  if (R < rows || block.count < kBlock) std::fill_n(to, kBlock * rows, E(0));
  for (int64_t n0 = 0; n0 < block.count; n0 += panel) {
    const int64_t real = std::min(panel, block.count - n0);
    const From* x = from + n0 * stride_n;
    E* base = to + n0 * rows;
    if (stride_n > stride_r) {  // in the order of memory
      for (int64_t n = 0; n < real; ++n) {
        for (int64_t r = 0; r < R; ++r) {
          base[r / SIDE * SIDE * panel + n * SIDE + r % SIDE] = convert<E>(x[r * stride_r + n * stride_n]);
        }
      }
      continue;
    }
    for (int64_t r = 0; r < R; r += SIDE) {
      const auto copy = [&](int64_t sides, int64_t stride) {
        for (int64_t side = 0; side < sides; ++side) {
          // Rows lie far apart: their few lines do not start the hardware prefetcher.
          const From* later = x + std::min(r + kRowsAhead + side, R - 1) * stride_r;
          for (int64_t n = 0; n < real; n += 64 / sizeof(From)) __builtin_prefetch(later + n * stride);
        }
        for (int64_t n = 0; n < real; ++n) {
          for (int64_t side = 0; side < sides; ++side) {
            base[r * panel + n * SIDE + side] = convert<E>(x[(r + side) * stride_r + n * stride]);
          }
        }
      };
      stride_n == 1 && R - r >= SIDE ? copy(SIDE, 1) : copy(std::min<int64_t>(R - r, SIDE), stride_n);
    }
  }
}

// A block of source [B, R, N] -> strips [rows / strip, kBlock, strip], with the same zeros.
template <typename From, typename T>
void pack_strips(const Tensor& source, const Block& block, T* to, int64_t rows, int64_t strip) {
  const int64_t R = source.size(1), stride_r = source.stride(1), stride_n = source.stride(2);
  const From* from = at<From>(source, block);
  if (R < rows || block.count < kBlock) std::fill_n(to, kBlock * rows, T(0));
  for (int64_t first = 0; first < R; first += strip) {
    const int64_t real = std::min(strip, R - first);
    const auto copy = [&](int64_t r, int64_t n) {
      to[first * kBlock + n * strip + r] = convert<T>(from[(first + r) * stride_r + n * stride_n]);
    };
    if (stride_n > stride_r) {
      for (int64_t n = 0; n < block.count; ++n) {
        for (int64_t r = 0; r < real; ++r) copy(r, n);
      }
    } else {
      for (int64_t r = 0; r < real; ++r) {
        for (int64_t n = 0; n < block.count; ++n) copy(r, n);
      }
    }
  }
}

// Strips -> the block's part of [B, R, N] contiguous.
template <typename To, typename T>
void unpack_strips(const T* from, int64_t strip, const Block& block, const Tensor& out) {
  const int64_t R = out.size(1), N = out.size(2);
  To* to = static_cast<To*>(out.mutable_data_ptr()) + block.b * R * N + block.n0;
  for (int64_t r = 0; r < R; ++r) {
    const T* row = from + r / strip * strip * kBlock + r % strip;
    for (int64_t n = 0; n < block.count; ++n) to[r * N + n] = convert<To>(row[n * strip]);
  }
}

// The block's part of [B, C, N] contiguous, from both of its sums.
template <typename T>
void unpack_sums(const T* columns, const T* rows, int64_t channels, const Block& block, const Tensor& out) {
  const int64_t C = out.size(1), N = out.size(2);
  T* to = static_cast<T*>(out.mutable_data_ptr()) + block.b * C * N + block.n0;
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t n = 0; n < block.count; ++n) {
      T sum = columns[c * kBlock + n];
      for (int64_t u = 0; u < kUnit<T>; ++u) sum += rows[(n * channels + c) * kUnit<T> + u];
      to[c * N + n] = sum;
    }
  }
}

}  // namespace ercn
