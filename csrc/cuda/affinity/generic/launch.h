#pragma once
// Operands and launchers of the generic affinity kernels, without torch's headers, on which nvcc is slow.
#include <arch/launch.h>

#include <stdexcept>
#include <string>

#include "affinity/generic/tiles.h"
#include "affinity/map.h"

namespace ercn::affinity {

// The forms of a packed map: two planes of bf16 terms, whose sum is x to 16 bits; fp32; fp32 rounded to TF32.
enum class MapForm { terms, fp32, tf32 };

// Sizes of one call. Features are padded to whole slabs, pixels to kPixelMultiple, channels to whole blocks.
struct Sizes {
  int batch, channels, dim, padded_channels, slabs;
  int64_t pixels, padded;

  // From value [B, C, N] and feat [B, D, N].
  template <typename Tensor>
  Sizes(const Tensor& value, const Tensor& feat)
      : batch(static_cast<int>(feat.size(0))),
        channels(static_cast<int>(value.size(1))),
        dim(static_cast<int>(feat.size(1))),
        padded_channels(arch::round_up(channels, kBlockC)),
        slabs(slabs_of(dim, static_cast<int>(feat.element_size()))),
        pixels(feat.size(2)),
        padded(arch::round_up<int64_t>(pixels, kPixelMultiple)) {}
};

// A one-dimensional grid.
inline int grid_size(int64_t blocks) {
  if (blocks < int64_t{1} << 31) return static_cast<int>(blocks);
  throw std::runtime_error("a grid of " + std::to_string(blocks) + " blocks; a GPU takes 2^31 - 1");
}

// feat, a map [B, D, N] -> [B, padded pixels, slabs, 128 bytes]. round: fp32 to TF32.
void pack_features(const Map& feat, bool round, unsigned char* packed, const Sizes& sizes, const arch::Stream& stream);

// -> [B, planes, padded channels, padded pixels]
void pack_map(const Map& map, MapForm form, void* packed, const Sizes& sizes, const arch::Stream& stream);

// out[i] = Σ_s parts[s · count + i]
void combine_splits(const float* parts, int splits, void* out, Float type, int64_t count, const arch::Stream& stream);

struct ForwardParams {
  const unsigned char* feat;   // [B, padded pixels, slabs, 128 bytes]
  const unsigned char* terms;  // [B, 2, padded channels, padded pixels] bf16, or exact [B, padded channels, …] fp32
  float* out;                  // [splits, B, C, N]
  Sizes sizes;
  Splits splits;
  ForwardShared shared;
};

struct BackwardParams {
  const unsigned char* feat;   // [B, padded pixels, slabs, 128 bytes]
  const float *value, *grad;   // [B, padded channels, padded pixels]
  float* grad_value;           // [splits, B, C, N], or null
  float* grad_feat_parts;      // [blocks of channels, splits, B, D, N], or null where there is one part:
  void* grad_feat;             // [B, D, N]
  Sizes sizes;
  Splits splits;
};

// type: of the features. exact: fp32 is multiplied to fp32's accuracy.
void forward(const ForwardParams& params, Float type, bool exact, const arch::Stream& stream);
void backward(const BackwardParams& params, Float type, bool exact, const arch::Stream& stream);

}  // namespace ercn::affinity
