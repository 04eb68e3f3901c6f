#pragma once
// Combines the partial sums of the Hopper affinity kernels in a fixed order and rounds once. Memory-bound.
#include <arch/base.h>
#include <arch/convert.h>

#include "affinity/sm90/prepare.h"
#include "affinity/sm90/tile_scheduler.h"

namespace ercn::sm90::affinity {

// out [B, C, N] of a channel block, from the first pixel of the scheduler's first row block on: the mirrored sums of
// the row blocks above, from the top down, then the direct sums, from left to right.
template <typename Out>
struct Combine {
  struct Params {
    const float* direct;    // [slots, P, rows]
    const float* mirrored;  // [row blocks, B, channels of the block, width]; null where A is dense
    Out* out;
    const int* exponents;  // [B, C] of the map that was multiplied, or null
    TileScheduler scheduler;
    int64_t pixels, width;
    int rows, padded_channels;  // of a row block, P
    int channels, channel, block_channels;
    bool accumulate;  // to the sums of earlier bands in out
  };
  static constexpr int kThreads = 128, kMinBlocks = 1, kPixelsOfThread = 4, kPixelsOfBlock = kThreads * kPixelsOfThread;

  // Grid: blocks of pixels, channels of the block, B. A thread's pixels are in one row block.
  ERCN_DEVICE static void run(const Params& p, unsigned char*) {
    const int c = arch::block_index().y, b = arch::block_index().z;
    const TileScheduler& s = p.scheduler;
    const int64_t first = static_cast<int64_t>(s.first_row_block) * p.rows;
    const int64_t thread = static_cast<int64_t>(arch::block_index().x) * kThreads + arch::thread_index();
    const int64_t n = first + thread * kPixelsOfThread;
    if (n >= p.pixels) return;
    const int row_block = static_cast<int>(n / p.rows);
    float sum[kPixelsOfThread] = {};
    if (p.mirrored != nullptr) {
      const int above = row_block - s.first_row_block < s.row_blocks ? row_block - s.first_row_block : s.row_blocks;
#pragma unroll 4
      for (int g = 0; g < above; ++g) {
        const int from = s.first_row_block + g;
        add(sum, p.mirrored + mirrored_offset(s, p.width, p.rows, p.block_channels, from, b, c, n));
      }
    }
    if (row_block < s.first_row_block + s.row_blocks) {
      const int64_t last = s.last_slot(b, row_block);
      for (int64_t slot = s.first_slot(b, row_block); slot <= last; ++slot) {
        add(sum, p.direct + (slot * p.padded_channels + c) * p.rows + n % p.rows);
      }
    }
    const int channel = p.channel + c;
    const int exponent = p.exponents == nullptr ? 0 : p.exponents[static_cast<int64_t>(b) * p.channels + channel];
    Out* out = p.out + (static_cast<int64_t>(b) * p.channels + channel) * p.pixels + n;
    for (int i = 0; i < kPixelsOfThread; ++i) {
      sum[i] = scaled(sum[i], exponent);
      if (p.accumulate && n + i < p.pixels) sum[i] += arch::to_float(out[i]);
    }
    if (sizeof(Out) == 4 && p.pixels % kPixelsOfThread == 0) {
      arch::Vector16 x;
#pragma unroll
      for (int i = 0; i < kPixelsOfThread; ++i) x.words[i] = arch::float_bits(sum[i]);
      arch::store_16(out, x);
    } else {
      for (int i = 0; i < kPixelsOfThread && n + i < p.pixels; ++i) out[i] = arch::from_float<Out>(sum[i]);
    }
  }

  ERCN_DEVICE static void add(float (&sum)[kPixelsOfThread], const float* part) {
    const arch::Vector16 x = arch::load_16(part);
    for (int i = 0; i < kPixelsOfThread; ++i) sum[i] += arch::float_of(x.words[i]);
  }
};

// grad_feat [B, D, N] = 2^u · the partial sums of its rows, by blocks of channels of value, then by spans.
template <typename Out>
struct CombineFeat {
  struct Params {
    const float* sums;  // [channel blocks, slots, rows, D]
    Out* grad_feat;
    const int* exponents;  // [2, B, C]
    TileScheduler scheduler;
    int64_t pixels;
    int rows, dim, channels, channel_blocks, batch;
  };
  static constexpr int kThreads = 256, kMinBlocks = 1, kSide = 32, kRow = kSide + 1;
  static constexpr int kShared = kSide * kRow * 4;

  // Grid: blocks of 32 pixels, of 32 features, B. Eight threads add a pixel's features; the block transposes them.
  ERCN_DEVICE static void run(const Params& p, unsigned char* shared) {
    float* tile = reinterpret_cast<float*>(shared);  // [pixels][features]
    const TileScheduler& s = p.scheduler;
    const int b = arch::block_index().z, d0 = arch::block_index().y * kSide;
    const int64_t n0 = static_cast<int64_t>(arch::block_index().x) * kSide;
    const int row_block = static_cast<int>(n0 / p.rows);
    const int row = arch::thread_index() / 8, d = arch::thread_index() % 8 * 4;
    const int64_t first = s.first_slot(b, row_block), last = s.last_slot(b, row_block);
    float sum[4] = {};
    for (int block = 0; block < p.channel_blocks; ++block) {
      for (int64_t slot = first; slot <= last; ++slot) {
        const int64_t at = ((block * s.slots() + slot) * p.rows + n0 % p.rows + row) * p.dim + d0 + d;
        const arch::Vector16 x = arch::load_16(p.sums + at);
        for (int i = 0; i < 4; ++i) sum[i] += arch::float_of(x.words[i]);
      }
    }
    const int exponent = pair_exponent(p.exponents, p.batch, p.channels, b);
    for (int i = 0; i < 4; ++i) tile[row * kRow + d + i] = scaled(sum[i], exponent);
    arch::sync_threads();
    for (int i = arch::thread_index(); i < kSide * kSide; i += kThreads) {
      const int n = i % kSide, feature = i / kSide;
      if (n0 + n >= p.pixels) continue;
      Out* row = p.grad_feat + (static_cast<int64_t>(b) * p.dim + d0 + feature) * p.pixels;
      row[n0 + n] = arch::from_float<Out>(tile[n * kRow + feature]);
    }
  }
};

}  // namespace ercn::sm90::affinity
