#include "affinity/sm90/affinity.h"

#include <algorithm>

#include "affinity/operands.h"
#include "affinity/sm90/combine.h"
#include "affinity/sm90/launch.h"
#include "affinity/sm90/prepare.h"

namespace ercn::sm90 {
namespace affinity {
namespace {

using arch::divide_up;
using arch::round_up;

struct Sizes {
  int batch, channels, dim;
  int64_t pixels;

  Sizes(const Tensor& value, const Tensor& feat)
      : batch(static_cast<int>(feat.size(0))),
        channels(static_cast<int>(value.size(1))),
        dim(static_cast<int>(feat.size(1))),
        pixels(feat.size(2)) {}

  int64_t padded_pixels() const { return round_up<int64_t>(pixels, kTileSide); }
  int channel_blocks() const { return divide_up(channels, kMostChannels); }
  int block_channels() const { return divide_up(channels, channel_blocks()); }  // of all but perhaps the last block
  int padded() const { return padded_channels(block_channels()); }
};

using ercn::affinity::data;
using ercn::affinity::map_of;
using ercn::affinity::mutable_data;

arch::Grid grid(int64_t x, int y, int z) { return {static_cast<int>(x), y, z}; }

// Whether TMA reads feat in place: pixel-major, with rows at multiples of 16 bytes.
bool is_pixel_major(const Tensor& feat) {
  const int64_t dim = feat.size(1);
  const auto row = [](int64_t stride, int64_t least) { return stride >= least && stride % 8 == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(feat.const_data_ptr()) % 16 == 0;
  return aligned && feat.stride(1) == 1 && (feat.size(2) == 1 || row(feat.stride(2), dim)) &&
         (feat.size(0) == 1 || row(feat.stride(0), dim));
}

// Pixel-major features: feat in place, or a packed copy.
struct PixelMajor {
  Tensor copy;
  Features features;

  PixelMajor(const Tensor& value, const Tensor& feat, const Sizes& sizes, const arch::Stream& stream) : copy(feat) {
    if (is_pixel_major(feat)) {
      const int64_t stride_n = sizes.pixels == 1 ? sizes.dim : feat.stride(2);
      const int64_t stride_b = sizes.batch == 1 ? stride_n * sizes.pixels : feat.stride(0);
      features = {feat.const_data_ptr(), stride_b, stride_n, sizes.batch, sizes.pixels, sizes.dim};
      return;
    }
    const ercn::affinity::Sizes padded(value, feat);
    copy = ercn::affinity::pack_features(feat, padded, false, stream);
    features = {copy.const_data_ptr(), padded.padded * sizes.dim, sizes.dim, sizes.batch, sizes.pixels, sizes.dim};
  }
};

// e of every channel: [maps, B, C]
Tensor exponents(std::initializer_list<Map> maps, const Tensor& like, const Sizes& sizes, const arch::Stream& stream) {
  const int count = static_cast<int>(maps.size());
  Tensor result = empty(like, {count, sizes.batch, sizes.channels}, ScalarType::Int);
  Exponents::Params params{{}, sizes.channels, sizes.batch, sizes.pixels, mutable_data<int>(result)};
  std::copy(maps.begin(), maps.end(), params.maps);
  arch::launch<Exponents>(params, grid(sizes.channels, sizes.batch, count), Exponents::kShared, stream);
  return result;
}

// The terms of one block of channels.
struct TermRows {
  Tensor memory;
  Rows rows;
  bool fp16;

  TermRows(const Tensor& like, const Sizes& sizes, ScalarType type)
      : memory(empty(like, {sizes.batch, 2 * sizes.padded(), sizes.padded_pixels()}, type)),
        rows{memory.const_data_ptr(), sizes.batch, 2 * sizes.padded(), sizes.padded_pixels()},
        fp16(type == ScalarType::Half) {}

  WriteTerms::Job job(const Map& map, bool low, int row, WriteTerms::Scale scale, int map_index) const {
    return {map, memory.mutable_data_ptr(), fp16, low, rows.rows, row, scale, map_index};
  }
};

void write_terms(
    std::initializer_list<WriteTerms::Job> jobs, const int* exponents, const Sizes& sizes, int channel,
    const arch::Stream& stream) {
  const int end = std::min(sizes.channels, channel + sizes.block_channels());
  WriteTerms::Params params{
      {}, exponents, sizes.batch, end, channel, sizes.padded(), sizes.channels, sizes.pixels, sizes.padded_pixels()};
  std::copy(jobs.begin(), jobs.end(), params.jobs);
  const int64_t blocks = divide_up<int64_t>(sizes.padded_pixels(), WriteTerms::kPixelsOfBlock);
  const int maps = static_cast<int>(jobs.size()) * sizes.batch;
  arch::launch<WriteTerms>(params, grid(blocks, sizes.padded(), maps), 0, stream);
}

TileScheduler make_scheduler(
    const Sizes& sizes, int columns, int rows, int first_row_block, int row_blocks, bool triangle, int workers) {
  TileScheduler s{sizes.batch, columns, first_row_block, row_blocks, triangle ? rows / kTileSide : 0, 0};
  s.workers = std::min<int64_t>(workers, s.tiles());
  return s;
}

template <typename Out>
void combine(
    const Tensor& direct, const float* mirrored, const Tensor& out, const int* exponents, const TileScheduler& s,
    const Sizes& sizes, int64_t width, int rows, int channel, const arch::Stream& stream) {
  const int channels = std::min(sizes.block_channels(), sizes.channels - channel);
  const int64_t left = sizes.pixels - static_cast<int64_t>(s.first_row_block) * rows;
  arch::launch<Combine<Out>>(
      {data<float>(direct), mirrored, mutable_data<Out>(out), exponents, s, sizes.pixels, width, rows, sizes.padded(),
       sizes.channels, channel, channels, s.first_row_block > 0},
      grid(divide_up<int64_t>(left, Combine<Out>::kPixelsOfBlock), channels, sizes.batch), 0, stream);
}

template <typename Element>
void forward_into(const Tensor& out, const Tensor& value, const Tensor& feat, bool triangle, int64_t mirrored_bytes) {
  const Sizes sizes(value, feat);
  const arch::Stream stream(feat);
  const PixelMajor pixels(value, feat, sizes, stream);
  constexpr bool kScaled = std::is_same_v<Element, arch::fp16>;
  const Tensor scales = kScaled ? exponents({map_of(value)}, feat, sizes, stream) : empty(feat, {0}, ScalarType::Int);
  const int* const exponent = kScaled ? data<int>(scales) : nullptr;
  const int rows = forward_rows(sizes.dim), workers = stream.multiprocessors();
  const int row_blocks = static_cast<int>(divide_up<int64_t>(sizes.pixels, rows));
  const int columns = static_cast<int>(sizes.padded_pixels() / kTileSide);
  const TermRows terms(feat, sizes, feat.scalar_type());
  for (int channel = 0; channel < sizes.channels; channel += sizes.block_channels()) {
    const int channels = std::min(sizes.block_channels(), sizes.channels - channel);
    const WriteTerms::Scale scale = kScaled ? WriteTerms::Scale::channel : WriteTerms::Scale::none;
    write_terms({terms.job(map_of(value), true, 0, scale, 0)}, exponent, sizes, channel, stream);
    for (int first = 0, count; first < row_blocks; first += count) {
      const int64_t maps = static_cast<int64_t>(sizes.batch) * channels;
      count = triangle ? row_blocks_in_band(mirrored_bytes, maps, sizes.padded_pixels(), rows, first) : row_blocks;
      const TileScheduler s = make_scheduler(sizes, columns, rows, first, count, triangle, workers);
      const Tensor direct = empty(feat, {s.slots(), sizes.padded(), rows}, ScalarType::Float);
      const int64_t width = triangle ? mirrored_width(sizes.padded_pixels(), rows, first) : 0;
      const Tensor mirrored = empty(feat, {count, maps, width}, ScalarType::Float);
      float* const to_mirrored = width == 0 ? nullptr : mutable_data<float>(mirrored);
      float* const to_direct = mutable_data<float>(direct);
      forward(
          {tensor_map<Element>(pixels.features, kTileSide), tensor_map<Element>(terms.rows, terms.rows.rows), s,
           to_direct, to_mirrored, width, channels},
          type_of(feat), sizes.dim, sizes.padded(), stream);
      combine<float>(direct, to_mirrored, out, exponent, s, sizes, width, rows, channel, stream);
    }
  }
}

template <typename Element>
void backward_into(
    const Tensor& grad_value, const Tensor& grad_feat, const Tensor& grad_out, const Tensor& value,
    const Tensor& feat) {
  const Sizes sizes(value, feat);
  const arch::Stream stream(feat);
  const PixelMajor pixels(value, feat, sizes, stream);
  const bool need_value = grad_value.numel() > 0;
  constexpr bool kScaled = std::is_same_v<Element, arch::fp16>;
  const Tensor scales = exponents({map_of(value), map_of(grad_out)}, feat, sizes, stream);
  const int* const grad_exponents = data<int>(scales) + static_cast<int64_t>(sizes.batch) * sizes.channels;
  const int columns = static_cast<int>(divide_up<int64_t>(sizes.pixels, backward_columns(sizes.dim)));
  const int row_blocks = static_cast<int>(divide_up<int64_t>(sizes.pixels, kTileSide));
  const TileScheduler s = make_scheduler(sizes, columns, kTileSide, 0, row_blocks, false, stream.multiprocessors());
  const TermRows terms(feat, sizes, feat.scalar_type()), pairs(feat, sizes, ScalarType::Half);
  const Tensor feat_sums = empty(feat, {sizes.channel_blocks(), s.slots(), kTileSide, sizes.dim}, ScalarType::Float);
  const Tensor value_sums = empty(feat, {need_value ? s.slots() : 0, sizes.padded(), kTileSide}, ScalarType::Float);
  const int64_t block_sums = s.slots() * kTileSide * sizes.dim;
  for (int channel = 0, block = 0; channel < sizes.channels; channel += sizes.block_channels(), ++block) {
    const WriteTerms::Scale scale = kScaled ? WriteTerms::Scale::channel : WriteTerms::Scale::none;
    write_terms(
        {pairs.job(map_of(value), false, 0, WriteTerms::Scale::channel, 0),
         pairs.job(map_of(grad_out), false, sizes.padded(), WriteTerms::Scale::pair, 1),
         terms.job(map_of(grad_out), true, 0, scale, 1)},
        data<int>(scales), sizes, channel, stream);
    float* const to_feat = mutable_data<float>(feat_sums) + block * block_sums;
    float* const to_value = need_value ? mutable_data<float>(value_sums) : nullptr;
    backward(
        {tensor_map<Element>(pixels.features, kTileSide),
         tensor_map<Element>(pixels.features, backward_columns(sizes.dim)),
         need_value ? tensor_map<Element>(terms.rows, terms.rows.rows) : arch::TensorMap{},
         tensor_map<arch::fp16>(pairs.rows, sizes.padded()), s, to_feat, to_value},
        type_of(feat), sizes.dim, sizes.padded(), stream);
    if (!need_value) continue;
    const int* const exponent = kScaled ? grad_exponents : nullptr;
    with_element(type_of(grad_value), [&](auto to) {
      combine<decltype(to)>(value_sums, nullptr, grad_value, exponent, s, sizes, 0, kTileSide, channel, stream);
    });
  }
  using Kernel = CombineFeat<Element>;
  arch::launch<Kernel>(
      {data<float>(feat_sums), mutable_data<Element>(grad_feat), data<int>(scales), s, sizes.pixels, kTileSide,
       sizes.dim, sizes.channels, sizes.channel_blocks(), sizes.batch},
      grid(divide_up<int64_t>(sizes.pixels, Kernel::kSide), sizes.dim / Kernel::kSide, sizes.batch), Kernel::kShared,
      stream);
}

}  // namespace
}  // namespace affinity

std::string cannot_relu_affinity(const Tensor&, const Tensor& feat) {
  const ScalarType type = feat.scalar_type();
  const int64_t dim = feat.size(1);
  if (arch::compute_capability(feat) != 90) return "they are for GPUs of compute capability 9.0";
  if (type != ScalarType::BFloat16 && type != ScalarType::Half) return "they take bfloat16 and float16 features";
  if (dim != 64 && dim != 128 && dim != 192 && dim != 256) {
    return "they take 64, 128, 192 or 256 feature channels, not " + std::to_string(dim);
  }
  if (feat.size(0) > affinity::kMostImages) {
    return "they take at most " + std::to_string(affinity::kMostImages) + " images";
  }
  return "";
}

Tensor relu_affinity(const Tensor& value, const Tensor& feat, bool triangle, int64_t mirrored_bytes) {
  const Tensor out = empty(value, {value.size(0), value.size(1), value.size(2)}, ScalarType::Float);
  if (out.numel() == 0) return out;
  with_half(type_of(feat), [&](auto element) {
    affinity::forward_into<decltype(element)>(out, value, feat, triangle, mirrored_bytes);
  });
  return out;
}

std::tuple<Tensor, Tensor> relu_affinity_backward(
    const Tensor& grad_out, const Tensor& value, const Tensor& feat, bool need_value) {
  const int64_t batch = value.size(0), channels = value.size(1), pixels = value.size(2);
  const Tensor grad_value = need_value ? empty(value, {batch, channels, pixels}, value.scalar_type())
                                       : empty(value, {0}, value.scalar_type());
  Tensor grad_feat = empty(feat, {batch, feat.size(1), pixels}, feat.scalar_type());
  if (channels == 0) torch::stable::fill_(grad_feat, 0);
  if (value.numel() == 0) return {grad_value, grad_feat};
  with_half(type_of(feat), [&](auto element) {
    affinity::backward_into<decltype(element)>(grad_value, grad_feat, grad_out, value, feat);
  });
  return {grad_value, grad_feat};
}

}  // namespace ercn::sm90
