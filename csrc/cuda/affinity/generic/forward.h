#pragma once
// Generic forward: out_i = Σ_j A_ij V_j for the 128 rows i of a block, over one slab of columns j. Each warp has 32
// rows. Tensor cores add with truncation, so the sums of a tile of columns are added to the total in fp32.
#include "affinity/generic/launch.h"
#include "affinity/generic/shared_tile.h"

namespace ercn::affinity {

template <typename Precision>
struct Forward {
  using Params = ForwardParams;
  static constexpr int kThreads = affinity::kThreads, kMinBlocks = 2;
  static constexpr int kM = kForwardRows / kWarps / 16, kN = kForwardColumns / 8, kC = kChannels / 8;

  ERCN_DEVICE static void run(const Params& p, unsigned char* shared) {
    const int64_t row_blocks = arch::divide_up<int64_t>(p.sizes.pixels, kForwardRows);
    int64_t block = arch::block_index().x;
    const int64_t row0 = block % row_blocks * kForwardRows;
    block /= row_blocks;
    const int slab = block % p.slabs.count;
    block /= p.slabs.count;
    const int channel0 = block % (p.sizes.padded_channels / kChannels) * kChannels;
    const int64_t b = block / (p.sizes.padded_channels / kChannels);
    const int64_t first = static_cast<int64_t>(slab) * p.slabs.tiles;
    const int64_t end = arch::divide_up<int64_t>(p.sizes.pixels, kForwardColumns);
    const int tiles = static_cast<int>(end - first < p.slabs.tiles ? end - first : p.slabs.tiles);
    const int warp_row = arch::warp_index() * 16 * kM;

    const int64_t stride = static_cast<int64_t>(p.sizes.chunks) * kRowBytes;
    const unsigned char* feat = p.feat + b * p.sizes.padded * stride;
    const unsigned char* rows_from = feat + row0 * stride;
    unsigned char* rows = shared;  // resident: all chunks; else one beside each stage
    unsigned char* columns = rows + (p.shared.resident ? p.sizes.chunks : kForwardStages) * kRowChunkBytes;
    unsigned char* terms = columns + kForwardStages * kColumnChunkBytes;

    const int steps = tiles * p.sizes.chunks;
    const auto start_copy = [&](int step) {
      if (step < steps) {
        const int tile = step / p.sizes.chunks, chunk = step % p.sizes.chunks, stage = step % kForwardStages;
        const int64_t column = (first + tile) * kForwardColumns;
        copy_rows<kForwardColumns>(
            columns + stage * kColumnChunkBytes, feat + column * stride + chunk * kRowBytes, stride);
        if (!p.shared.resident) {
          copy_rows<kForwardRows>(rows + stage * kRowChunkBytes, rows_from + chunk * kRowBytes, stride);
        }
        if (chunk == 0) copy_terms(p, terms + tile % p.shared.term_tiles * kTermTileBytes, b, channel0, column);
      }
      arch::cp_async_commit();
    };
    if (p.shared.resident) {
      for (int chunk = 0; chunk < p.sizes.chunks; ++chunk) {
        copy_rows<kForwardRows>(rows + chunk * kRowChunkBytes, rows_from + chunk * kRowBytes, stride);
      }
    }
    for (int step = 0; step < kForwardStages - 1; ++step) start_copy(step);

    float out[kM][kC][4] = {}, t[kM][kN][4] = {};
    for (int step = 0; step < steps; ++step) {
      arch::cp_async_wait<kForwardStages - 2>();
      arch::sync_threads();
      start_copy(step + kForwardStages - 1);
      const int tile = step / p.sizes.chunks, chunk = step % p.sizes.chunks, stage = step % kForwardStages;
      const unsigned char* row_tile = rows + (p.shared.resident ? chunk : stage) * kRowChunkBytes;
      add_product<Precision>(t, row_tile, warp_row, columns + stage * kColumnChunkBytes);
      if (chunk < p.sizes.chunks - 1) continue;
      rectify(t, p.sizes.pixels - (first + tile) * kForwardColumns);
      propagate(out, t, terms + tile % p.shared.term_tiles * kTermTileBytes, p.sizes.channels - channel0);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          for (int i = 0; i < 4; ++i) t[m][n][i] = 0.0f;
        }
      }
    }
    store(p, out, (slab * static_cast<int64_t>(p.sizes.batch) + b) * p.sizes.channels, channel0, row0 + warp_row);
  }

  // Value of one tile of columns: [2 terms, 32 channels] rows of 64 bf16, or [2, 32 channels] of 32 fp32 columns each.
  ERCN_DEVICE static void copy_terms(const Params& p, unsigned char* tile, int64_t b, int channel0, int64_t column) {
    constexpr int kBytes = Precision::kExact ? 4 : 2;
    const int64_t channel_bytes = p.sizes.padded * kBytes;
    for (int half = 0; half < 2; ++half) {
      const int64_t plane = Precision::kExact ? b : 2 * b + half;
      const int64_t row = plane * p.sizes.padded_channels + channel0;
      const unsigned char* from = p.terms + row * channel_bytes + column * kBytes;
      copy_rows<kChannels, Precision::kExact ? kPairs : 16>(
          tile + half * kChannels * kRowBytes, Precision::kExact ? from + half * kRowBytes : from, channel_bytes);
    }
  }

  // out += A V of one tile, for the channels that exist.
  ERCN_DEVICE static void propagate(
      float (&out)[kM][kC][4], float (&a)[kM][kN][4], const unsigned char* terms, int channels) {
    if constexpr (Precision::kExact) {
      const int lane = arch::lane_index();
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = 0; c < kC; ++c) {
          if (8 * c >= channels) continue;
          const int row = n / 4 * kChannels + 8 * c + lane / 4;
          const float* pair = reinterpret_cast<const float*>(terms + swizzled<kPairs>(row, n % 4 * 32 + lane % 4 * 8));
          const float v[2] = {pair[0], pair[1]};
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            float factor[4], sum[4] = {};
            as_factor(factor, a[m][n]);
            mma_fp32<true>(sum, factor, v);
            for (int i = 0; i < 4; ++i) out[m][c][i] += sum[i];
          }
        }
      }
    } else {
      float sum[kM][kC][4] = {};
#pragma unroll
      for (int k = 0; k < kN / 2; ++k) {
        uint32_t high[kM][4], low[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          split(high[m], low[m], a[m][2 * k], a[m][2 * k + 1]);
        }
#pragma unroll
        for (int c = 0; c < kC; c += 2) {
          if (8 * c >= channels) continue;
          uint32_t v[2][2][2];
          for (int term = 0; term < 2; ++term) load_b(v[term], terms, term * kChannels + 8 * c, k);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int m = 0; m < kM; ++m) {
              if (Precision::kTerms == 2) arch::mma<arch::bf16>(sum[m][c + half], low[m], v[0][half]);
              arch::mma<arch::bf16>(sum[m][c + half], high[m], v[1][half]);
              arch::mma<arch::bf16>(sum[m][c + half], high[m], v[0][half]);
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int c = 0; c < kC; ++c) {
          for (int i = 0; i < 4; ++i) out[m][c][i] += sum[m][c][i];
        }
      }
    }
  }

  // The accumulators of 16 columns as the bf16 terms of a factor.
  ERCN_DEVICE static void split(
      uint32_t (&high)[4], uint32_t (&low)[4], const float (&left)[4], const float (&right)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = i < 2 ? left[2 * i] : right[2 * i - 4], y = i < 2 ? left[2 * i + 1] : right[2 * i - 3];
      high[i] = arch::pack<arch::bf16>(x, y);
      if (Precision::kTerms == 2) {
        const float x_rest = rest(x, arch::unpack_low<arch::bf16>(high[i]));
        low[i] = arch::pack<arch::bf16>(x_rest, rest(y, arch::unpack_high<arch::bf16>(high[i])));
      }
    }
  }

  ERCN_DEVICE static void store(
      const Params& p, const float (&out)[kM][kC][4], int64_t channel_row, int channel0, int64_t row0) {
    const int lane = arch::lane_index(), channels = p.sizes.channels;
    const int64_t pixels = p.sizes.pixels;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = row0 + 16 * m + lane / 4 + i / 2 * 8;
          const int channel = channel0 + 8 * c + lane % 4 * 2 + i % 2;
          if (row < pixels && channel < channels) p.out[(channel_row + channel) * pixels + row] = out[m][c][i];
        }
      }
    }
  }
};

}  // namespace ercn::affinity
