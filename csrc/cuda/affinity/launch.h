#pragma once
// Starts the affinity kernels on packed operands. Free of torch's headers, which nvcc takes longer for than for a kernel.
#include <arch/launch.h>

#include <stdexcept>
#include <string>

#include "affinity/tiles.h"
#include "map.h"

namespace ercn::affinity {

enum class Mode { bf16, fp16, tf32, fp32 };  // precision.h says what each is
// How a map is packed: two planes of bf16 terms, whose sum is x to 16 bits; fp32; fp32 rounded to TF32.
enum class MapForm { terms, whole, round };

// Sizes of one call. Features are padded to whole chunks, pixels to kPixelMultiple, channels to whole blocks.
struct Sizes {
  int64_t batch, channels, dim, pixels, padded, padded_channels;
  int chunks;

  // From value [B, C, N] and feat [B, D, N].
  template <typename Tensor>
  Sizes(const Tensor& value, const Tensor& feat)
      : batch(feat.size(0)),
        channels(value.size(1)),
        dim(feat.size(1)),
        pixels(feat.size(2)),
        padded(arch::round_up<int64_t>(pixels, kPixelMultiple)),
        padded_channels(arch::round_up<int64_t>(channels, kChannels)),
        chunks(chunks_of(dim, static_cast<int>(feat.element_size()))) {}
};

// Blocks of a grid of one dimension.
inline int grid_size(int64_t blocks) {
  if (blocks < int64_t{1} << 31) return static_cast<int>(blocks);
  throw std::runtime_error("a grid of " + std::to_string(blocks) + " blocks; a GPU takes 2^31 - 1");
}

// feat as a map [B, D, N] -> [B, padded pixels, chunks, 128 bytes]; `round`: fp32 to TF32.
void pack_features(const Map& feat, bool round, unsigned char* packed, const Sizes& sizes, const arch::Stream& stream);

// -> [B, planes, padded channels, padded pixels]
void pack_map(const Map& map, MapForm form, void* packed, const Sizes& sizes, const arch::Stream& stream);

// out[i] = Σ_s parts[s · count + i]
void sum_slabs(
    const float* parts, int slabs, void* out, Float type, int64_t count, const arch::Stream& stream);

struct ForwardOperands {
  const unsigned char *feat, *terms;
  float* out;  // [slabs, B, C, N]
};

void forward(
    Mode mode, const ForwardOperands& operands, const Sizes& sizes, Slabs slabs, ForwardShared shared,
    const arch::Stream& stream);

struct BackwardOperands {
  const unsigned char* feat;
  const float *value, *grad;
  float* grad_value;       // [slabs, B, C, N], or null
  float* grad_feat_parts;  // [blocks of channels, slabs, B, D, N], or null:
  void* grad_feat;         // [B, D, N]
};

void backward_bf16(const BackwardOperands& operands, const Sizes& sizes, Slabs slabs, const arch::Stream& stream);
void backward_fp16(const BackwardOperands& operands, const Sizes& sizes, Slabs slabs, const arch::Stream& stream);
void backward_tf32(const BackwardOperands& operands, const Sizes& sizes, Slabs slabs, const arch::Stream& stream);
void backward_fp32(const BackwardOperands& operands, const Sizes& sizes, Slabs slabs, const arch::Stream& stream);

}  // namespace ercn::affinity
