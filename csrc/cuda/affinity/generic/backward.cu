// Generic backward of a block's 64 rows i, whose gradients stay in registers, over one split of the columns j:
//   W_ij = 1[T_ij > 0] (V_i·G_j + G_i·V_j),   grad_feat_i = Σ_j W_ij F_j,   grad_value_i = Σ_j A_ij G_j
// A warp has 16 rows. V and G are fp32, their products TF32. Tensor cores truncate their sums, so those of a tile of
// columns are added to the total in fp32.
#include "affinity/generic/launch.h"
#include "affinity/generic/shared_tile.h"

namespace ercn::affinity {

// SLABS: slabs of grad_feat that a block owns. T takes all slabs.
template <typename Precision, int SLABS>
struct Backward {
  using Element = typename Precision::Element;
  using Params = BackwardParams;
  static constexpr int kThreads = affinity::kThreads, kMinBlocks = 1;
  static constexpr int kN = kBackwardBlockN / 8, kC = kBlockC / 8;
  static constexpr int kDepth = kRowBytes / sizeof(Element), kD = kDepth / 8;  // features of a slab, tiles of 8
  static constexpr int kColumnBytes = kBackwardBlockN * kRowBytes, kRowTileBytes = kBackwardBlockM * kRowBytes;
  static constexpr int kPairTile = kBlockC * kRowBytes;  // 32 pixels of fp32 of one map

  ERCN_DEVICE static void run(const Params& p, unsigned char* shared) {
    const int64_t row_blocks = arch::divide_up<int64_t>(p.sizes.pixels, kBackwardBlockM);
    int64_t block = arch::block_index().x;
    const int64_t row0 = block % row_blocks * kBackwardBlockM;
    block /= row_blocks;
    const int groups = arch::divide_up(p.sizes.slabs, SLABS), channel_blocks = p.sizes.padded_channels / kBlockC;
    const int first_slab = block % groups * SLABS;
    block /= groups;
    const int split = block % p.splits.count;
    block /= p.splits.count;
    const int channel0 = block % channel_blocks * kBlockC;
    const int64_t b = block / channel_blocks;
    const int64_t first = static_cast<int64_t>(split) * p.splits.tiles;
    const int64_t end = arch::divide_up<int64_t>(p.sizes.pixels, kBackwardBlockN);
    const int tiles = static_cast<int>(end - first < p.splits.tiles ? end - first : p.splits.tiles);
    const int warp_row = arch::warp_index() * 16;

    const int64_t stride = static_cast<int64_t>(p.sizes.slabs) * kRowBytes;
    const unsigned char* feat = p.feat + b * p.sizes.padded * stride;
    unsigned char* rows = shared;
    unsigned char* pair_rows = rows + p.sizes.slabs * kRowTileBytes;
    unsigned char* stages = pair_rows + kPairRowBytes;
    const int stage_bytes = p.sizes.slabs * kColumnBytes + kPairColumnBytes;
    const auto start_copy = [&](int tile) {
      if (tile < tiles) {
        unsigned char* stage = stages + tile % kBackwardStages * stage_bytes;
        const int64_t column = (first + tile) * kBackwardBlockN;
        for (int slab = 0; slab < p.sizes.slabs; ++slab) {
          copy_rows<kBackwardBlockN>(stage + slab * kColumnBytes, feat + column * stride + slab * kRowBytes, stride);
        }
        copy_pairs(p, stage + p.sizes.slabs * kColumnBytes, b, channel0, column);
      }
      arch::cp_async_commit();
    };
    for (int slab = 0; slab < p.sizes.slabs; ++slab) {
      copy_rows<kBackwardBlockM>(rows + slab * kRowTileBytes, feat + row0 * stride + slab * kRowBytes, stride);
    }
    for (int half = 0; half < kBackwardBlockM / 32; ++half) {
      copy_pairs(p, pair_rows + half * 2 * kPairTile, b, channel0, row0 + 32 * half);
    }
    start_copy(0);

    float grad_feat[SLABS][kD][4] = {}, grad_value[kC][4] = {};
    const int channels = p.sizes.channels - channel0;
    const unsigned char* own_pairs = pair_rows + warp_row / 32 * 2 * kPairTile;
    for (int tile = 0; tile < tiles; ++tile) {
      arch::cp_async_wait<0>();
      arch::sync_threads();
      start_copy(tile + 1);
      const unsigned char* stage = stages + tile % kBackwardStages * stage_bytes;
      const unsigned char* pairs = stage + p.sizes.slabs * kColumnBytes;
      float t[1][kN][4] = {}, w[kN][4] = {};
      for (int slab = 0; slab < p.sizes.slabs; ++slab) {
        add_product<Precision>(t, rows + slab * kRowTileBytes, warp_row, stage + slab * kColumnBytes);
      }
      rectify(t, p.sizes.pixels - (first + tile) * kBackwardBlockN);
      add_pairs(w, own_pairs, warp_row % 32, pairs, channels);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) w[n][i] = t[0][n][i] == 0.0f ? 0.0f : narrow(w[n][i]);
      }
      if (p.grad_value != nullptr && first_slab == 0) add_value(grad_value, t[0], pairs + kPairTile, channels);
#pragma unroll
      for (int slab = 0; slab < SLABS; ++slab) {
        if (first_slab + slab >= p.sizes.slabs) continue;
        add_feat(grad_feat[slab], w, stage + (first_slab + slab) * kColumnBytes);
      }
    }

    const int batch = p.sizes.batch, C = p.sizes.channels, D = p.sizes.dim;
    const int64_t N = p.sizes.pixels;
    if (p.grad_value != nullptr && first_slab == 0) {
      float* to = p.grad_value + (split * int64_t{batch} + b) * C * N;
      store(to, grad_value, channel0, C, row0 + warp_row, N);
    }
    const int64_t part = static_cast<int64_t>(channel0 / kBlockC) * p.splits.count + split;
#pragma unroll
    for (int slab = 0; slab < SLABS; ++slab) {
      const int d0 = (first_slab + slab) * kDepth;
      if (p.grad_feat_parts != nullptr) {
        store(p.grad_feat_parts + (part * batch + b) * D * N, grad_feat[slab], d0, D, row0 + warp_row, N);
      } else {
        store(static_cast<Element*>(p.grad_feat) + b * D * N, grad_feat[slab], d0, D, row0 + warp_row, N);
      }
    }
  }

  // Value, then gradient, of 32 pixels: [32 channels] rows of 32 fp32 each.
  ERCN_DEVICE static void copy_pairs(const Params& p, unsigned char* tile, int64_t b, int channel0, int64_t pixel) {
    const int64_t from = (b * p.sizes.padded_channels + channel0) * p.sizes.padded + pixel;
    const int64_t stride = p.sizes.padded * sizeof(float);
    copy_rows<kBlockC, kPairs>(tile, reinterpret_cast<const unsigned char*>(p.value + from), stride);
    copy_rows<kBlockC, kPairs>(tile + kPairTile, reinterpret_cast<const unsigned char*>(p.grad + from), stride);
  }

  ERCN_DEVICE static float at(const unsigned char* tile, int channel, int pixel) {
    return *reinterpret_cast<const float*>(tile + swizzled<kPairs>(channel, pixel * 4));
  }

  // w += V_i·G_j + G_i·V_j, without tiles of padding channels. pixel: the warp's first row in own_pairs.
  ERCN_DEVICE static void add_pairs(
      float (&w)[kN][4], const unsigned char* own_pairs, int pixel, const unsigned char* pairs, int channels) {
    const int group = arch::lane_index() / 4, within = arch::lane_index() % 4;
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      if (8 * c >= channels) continue;
#pragma unroll
      for (int map = 0; map < 2; ++map) {
        float own[4];
        for (int i = 0; i < 4; ++i) {
          own[i] = at(own_pairs + map * kPairTile, 8 * c + within + i / 2 * 4, pixel + group + i % 2 * 8);
        }
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          float other[2];
          for (int i = 0; i < 2; ++i) {
            other[i] = at(pairs + (1 - map) * kPairTile, 8 * c + within + 4 * i, 8 * n + group);
          }
          mma_fp32<Precision::kExact>(w[n], own, other);
        }
      }
    }
  }

  // grad_value += A G of one tile
  ERCN_DEVICE static void add_value(
      float (&grad_value)[kC][4], const float (&a)[kN][4], const unsigned char* grad, int channels) {
    const int group = arch::lane_index() / 4, within = arch::lane_index() % 4;
    float sum[kC][4] = {};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      float factor[4];
      as_factor(factor, a[n]);
      for (int i = 0; i < 4; ++i) factor[i] = Precision::kExact ? factor[i] : arch::round_tf32(factor[i]);
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        if (8 * c >= channels) continue;
        const float* pair = reinterpret_cast<const float*>(grad + swizzled<kPairs>(8 * c + group, 32 * n + 8 * within));
        const float g[2] = {pair[0], pair[1]};
        mma_fp32<Precision::kExact>(sum[c], factor, g);
      }
    }
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      for (int i = 0; i < 4; ++i) grad_value[c][i] += sum[c][i];
    }
  }

  // The type of W as a factor of F: bf16 for bf16 features, else TF32, for fp16's exponent is too short for gradients.
  static constexpr bool kHalfWidth = std::is_same_v<typename Precision::Product, arch::bf16>;
  ERCN_DEVICE static float narrow(float w) { return kHalfWidth || Precision::kExact ? w : arch::round_tf32(w); }

  // grad_feat += W F of one tile and one slab
  ERCN_DEVICE static void add_feat(float (&grad_feat)[kD][4], const float (&w)[kN][4], const unsigned char* columns) {
    const int lane = arch::lane_index();
    if constexpr (sizeof(Element) == 2) {
#pragma unroll
      for (int d = 0; d < kD; d += 2) {
        float sum[2][4] = {};
#pragma unroll
        for (int k = 0; k < kN / 2; ++k) {
          uint32_t f[4];
          arch::ldmatrix_transposed(f, columns + swizzled(16 * k + lane % 16, 16 * d + lane / 16 * 16));
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            add_half(sum[half], w[2 * k], w[2 * k + 1], f[2 * half], f[2 * half + 1]);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          for (int i = 0; i < 4; ++i) grad_feat[d + half][i] += sum[half][i];
        }
      }
    } else {
#pragma unroll
      for (int d = 0; d < kD; ++d) {
        float sum[4] = {};
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          float factor[4], f[2];
          as_factor(factor, w[n]);
          for (int i = 0; i < 2; ++i) {
            const int column = 8 * n + lane % 4 * 2 + i;
            f[i] = *reinterpret_cast<const float*>(columns + swizzled(column, (8 * d + lane / 4) * 4));
          }
          mma_fp32<Precision::kExact>(sum, factor, f);
        }
        for (int i = 0; i < 4; ++i) grad_feat[d][i] += sum[i];
      }
    }
  }

  // sum += W F of 16 columns: left and right are W's accumulators of 8 each, f their features, two columns a register.
  ERCN_DEVICE static void add_half(
      float (&sum)[4], const float (&left)[4], const float (&right)[4], uint32_t f_left, uint32_t f_right) {
    if constexpr (kHalfWidth) {
      const uint32_t a[4] = {
          arch::pack<arch::bf16>(left[0], left[1]), arch::pack<arch::bf16>(left[2], left[3]),
          arch::pack<arch::bf16>(right[0], right[1]), arch::pack<arch::bf16>(right[2], right[3])};
      const uint32_t f[2] = {f_left, f_right};
      arch::mma<arch::bf16>(sum, a, f);
    } else {
      float factor[4];
      const float low[2] = {arch::unpack_low<Element>(f_left), arch::unpack_high<Element>(f_left)};
      as_factor(factor, left);
      mma_fp32<false>(sum, factor, low);
      const float high[2] = {arch::unpack_low<Element>(f_right), arch::unpack_high<Element>(f_right)};
      as_factor(factor, right);
      mma_fp32<false>(sum, factor, high);
    }
  }

  // Accumulators of 16 pixels and 8·K channels into rows [channels, pixels].
  template <typename To, int K>
  ERCN_DEVICE static void store(
      To* to, const float (&sums)[K][4], int channel0, int channels, int64_t row0, int64_t pixels) {
    const int lane = arch::lane_index();
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = row0 + lane / 4 + i / 2 * 8;
        const int channel = channel0 + 8 * k + lane % 4 * 2 + i % 2;
        if (row < pixels && channel < channels) to[channel * pixels + row] = arch::from_float<To>(sums[k][i]);
      }
    }
  }
};
namespace {

// By the first SLABS that holds all features, or the last.
template <typename Precision, int SLABS, int... MORE>
void run(const BackwardParams& params, const arch::Stream& stream) {
  const Sizes& sizes = params.sizes;
  if constexpr (sizeof...(MORE) > 0) {
    if (sizes.slabs > SLABS) return run<Precision, MORE...>(params, stream);
  }
  const int64_t blocks = arch::divide_up<int64_t>(sizes.pixels, kBackwardBlockM) * arch::divide_up(sizes.slabs, SLABS) *
                         (sizes.padded_channels / kBlockC) * sizes.batch * params.splits.count;
  arch::launch<Backward<Precision, SLABS>>(params, {grid_size(blocks)}, backward_shared(sizes.slabs), stream);
}

}  // namespace

void backward(const BackwardParams& params, Float type, bool exact, const arch::Stream& stream) {
  if (type == Float::bf16) return run<BFloat16, 1, 2, 3, 4>(params, stream);
  if (type == Float::fp16) return run<Float16, 2, 4>(params, stream);
  exact ? run<Float32, 2, 4, 6>(params, stream) : run<TensorFloat32, 2, 4, 6, 8>(params, stream);
}

}  // namespace ercn::affinity
