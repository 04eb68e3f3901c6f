// Generic forward: out_i = Σ_j A_ij V_j of a block's 128 rows i over one split of the columns j. A warp has 32 rows.
// Tensor cores truncate their sums, so those of a tile of columns are added to the total in fp32.
#include "affinity/generic/launch.h"
#include "affinity/generic/shared_tile.h"

namespace ercn::affinity {

template <typename Precision>
struct Forward {
  using Params = ForwardParams;
  static constexpr int kThreads = affinity::kThreads, kMinBlocks = 2;
  static constexpr int kM = kForwardBlockM / kWarps / 16, kN = kForwardBlockN / 8, kC = kBlockC / 8;

  ERCN_DEVICE static void run(const Params& p, unsigned char* shared) {
    const int64_t row_blocks = arch::divide_up<int64_t>(p.sizes.pixels, kForwardBlockM);
    int64_t block = arch::block_index().x;
    const int64_t row0 = block % row_blocks * kForwardBlockM;
    block /= row_blocks;
    const int split = block % p.splits.count;
    block /= p.splits.count;
    const int channel0 = block % (p.sizes.padded_channels / kBlockC) * kBlockC;
    const int64_t b = block / (p.sizes.padded_channels / kBlockC);
    const int64_t first = static_cast<int64_t>(split) * p.splits.tiles;
    const int64_t end = arch::divide_up<int64_t>(p.sizes.pixels, kForwardBlockN);
    const int tiles = static_cast<int>(end - first < p.splits.tiles ? end - first : p.splits.tiles);
    const int warp_row = arch::warp_index() * 16 * kM;

    const int64_t stride = static_cast<int64_t>(p.sizes.slabs) * kRowBytes;
    const unsigned char* feat = p.feat + b * p.sizes.padded * stride;
    const unsigned char* rows_from = feat + row0 * stride;
    unsigned char* rows = shared;  // resident: all slabs; else one for each stage
    unsigned char* columns = rows + (p.shared.resident ? p.sizes.slabs : kForwardStages) * kRowSlabBytes;
    unsigned char* terms = columns + kForwardStages * kColumnSlabBytes;

    const int steps = tiles * p.sizes.slabs;
    const auto start_copy = [&](int step) {
      if (step < steps) {
        const int tile = step / p.sizes.slabs, slab = step % p.sizes.slabs, stage = step % kForwardStages;
        const int64_t column = (first + tile) * kForwardBlockN;
        copy_rows<kForwardBlockN>(
            columns + stage * kColumnSlabBytes, feat + column * stride + slab * kRowBytes, stride);
        if (!p.shared.resident) {
          copy_rows<kForwardBlockM>(rows + stage * kRowSlabBytes, rows_from + slab * kRowBytes, stride);
        }
        if (slab == 0) copy_terms(p, terms + tile % p.shared.term_tiles * kTermTileBytes, b, channel0, column);
      }
      arch::cp_async_commit();
    };
    if (p.shared.resident) {
      for (int slab = 0; slab < p.sizes.slabs; ++slab) {
        copy_rows<kForwardBlockM>(rows + slab * kRowSlabBytes, rows_from + slab * kRowBytes, stride);
      }
    }
    for (int step = 0; step < kForwardStages - 1; ++step) start_copy(step);

    float out[kM][kC][4] = {}, t[kM][kN][4] = {};
    for (int step = 0; step < steps; ++step) {
      arch::cp_async_wait<kForwardStages - 2>();
      arch::sync_threads();
      start_copy(step + kForwardStages - 1);
      const int tile = step / p.sizes.slabs, slab = step % p.sizes.slabs, stage = step % kForwardStages;
      const unsigned char* row_tile = rows + (p.shared.resident ? slab : stage) * kRowSlabBytes;
      add_product<Precision>(t, row_tile, warp_row, columns + stage * kColumnSlabBytes);
      if (slab < p.sizes.slabs - 1) continue;
      rectify(t, p.sizes.pixels - (first + tile) * kForwardBlockN);
      propagate(out, t, terms + tile % p.shared.term_tiles * kTermTileBytes, p.sizes.channels - channel0);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          for (int i = 0; i < 4; ++i) t[m][n][i] = 0.0f;
        }
      }
    }
    store(p, out, (split * static_cast<int64_t>(p.sizes.batch) + b) * p.sizes.channels, channel0, row0 + warp_row);
  }

  // Value of a tile of columns: rows [2 terms, 32 channels] of 64 bf16, or [2 halves, 32 channels] of 32 fp32.
  ERCN_DEVICE static void copy_terms(const Params& p, unsigned char* tile, int64_t b, int channel0, int64_t column) {
    constexpr int kBytes = Precision::kExact ? 4 : 2;
    const int64_t channel_bytes = p.sizes.padded * kBytes;
    for (int half = 0; half < 2; ++half) {
      const int64_t plane = Precision::kExact ? b : 2 * b + half;
      const int64_t row = plane * p.sizes.padded_channels + channel0;
      const unsigned char* from = p.terms + row * channel_bytes + column * kBytes;
      copy_rows<kBlockC, Precision::kExact ? kPairs : 16>(
          tile + half * kBlockC * kRowBytes, Precision::kExact ? from + half * kRowBytes : from, channel_bytes);
    }
  }

  // out += A V of one tile, without tiles of padding channels.
  ERCN_DEVICE static void propagate(
      float (&out)[kM][kC][4], float (&a)[kM][kN][4], const unsigned char* terms, int channels) {
    if constexpr (Precision::kExact) {
      const int lane = arch::lane_index();
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = 0; c < kC; ++c) {
          if (8 * c >= channels) continue;
          const int row = n / 4 * kBlockC + 8 * c + lane / 4;
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
          to_terms(high[m], low[m], a[m][2 * k], a[m][2 * k + 1]);
        }
#pragma unroll
        for (int c = 0; c < kC; c += 2) {
          if (8 * c >= channels) continue;
          uint32_t v[2][2][2];
          for (int term = 0; term < 2; ++term) load_b(v[term], terms, term * kBlockC + 8 * c, k);
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
  ERCN_DEVICE static void to_terms(
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

void forward(const ForwardParams& params, Float type, bool exact, const arch::Stream& stream) {
  const Sizes& sizes = params.sizes;
  const int64_t blocks = arch::divide_up<int64_t>(sizes.pixels, kForwardBlockM) * (sizes.padded_channels / kBlockC) *
                         sizes.batch * params.splits.count;
  with_precision(type, exact, [&](auto precision) {
    arch::launch<Forward<decltype(precision)>>(params, {grid_size(blocks)}, params.shared.bytes, stream);
  });
}

}  // namespace ercn::affinity
