// ReLU affinity on the CPU, registered as ercn_native::relu_affinity_cpu and …_backward_cpu (LibTorch stable ABI).
//   Y = V · A,  A = relu(FᵀF);   dV = G · A;   dF = F · W,  W = 1[FᵀF > 0] ⊙ (VᵀG + GᵀV)
// V, G [B, C, N] in fp32 or fp64; F [B, D, N] in that type, or bf16 beside fp32; any strides. A and W are symmetric:
// only blocks on one side of the diagonal are formed, and each serves its rows and its columns. schedule.h says why the
// result does not depend on threads. Extra memory: packed copies of the inputs and the outputs' sums, O(B · N · (C +
// D)).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "affinity_packing.h"
#include "affinity_pairs.h"
#include "kernels.h"

namespace ercn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
constexpr ScalarType scalar_type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// `width` numbers of every pixel of whole blocks. A tensor is the memory, so that torch's allocator sees it.
template <typename T>
class Packed {
 public:
  Packed(const Tensor& like, int64_t B, int64_t N, int64_t width)
      : image_(round_up(N, kBlock) * width),
        width_(width),
        memory_(torch::stable::new_empty(
            like, {B * image_}, std::is_same_v<T, uint16_t> ? ScalarType::BFloat16 : scalar_type<T>)) {}

  // The numbers of image b from pixel n0 on, the first of a block; null where the width is 0.
  T* at(int64_t b, int64_t n0 = 0) const {
    return width_ ? static_cast<T*>(memory_.mutable_data_ptr()) + b * image_ + n0 * width_ : nullptr;
  }
  T* at(const Block& block) const { return at(block.b, block.n0); }
  void zero(const Block& block) const { std::fill_n(at(block), kBlock * width_, T(0)); }

 private:
  int64_t image_, width_;
  Tensor memory_;
};

// From: feat's element in memory, E: in the panels, T: of all else.
template <typename From, typename E, typename T>
Tensor forward(const AffinityKernel<E, T>& kernel, const Tensor& value, const Tensor& feat) {
  const int64_t B = feat.size(0), C = value.size(1), D = feat.size(1), N = feat.size(2);
  const Tensor out = torch::stable::new_empty(value, {B, C, N});
  if (B * C * N == 0) return out;
  constexpr int side = sizeof(E) == 2 ? 2 : 1;
  const int64_t depth = round_up(D, side), channels = round_up(C, kChannels);
  const Packed<E> panels(feat, B, N, depth);
  const Packed<T> values(feat, B, N, channels), units(feat, B, N, channels), column_sums(feat, B, N, channels),
      row_sums(feat, B, N, channels * kUnit<T>);
  std::vector<AffinityImage<E, T>> images;
  for (int64_t b = 0; b < B; ++b) {
    images.push_back({.feat = panels.at(b),
                      .summed = values.at(b),
                      .units = units.at(b),
                      .column_sums = column_sums.at(b),
                      .row_sums = row_sums.at(b),
                      .C = C,
                      .channels = channels,
                      .D = D,
                      .N = N});
  }
  for_each_block(B, N, [&](const Block& block) {
    pack_panels<From, side>(feat, block, panels.at(block), depth, kernel.panel);
    pack_panels<T>(value, block, values.at(block), channels, kBlock);
    pack_panels<T>(value, block, units.at(block), channels, kUnit<T>);
    column_sums.zero(block);
    row_sums.zero(block);
  });
  Pairs<E, T>(kernel, images).run();
  for_each_block(B, N, [&](const Block& block) {
    unpack_sums(column_sums.at(block), row_sums.at(block), channels, block, out);
  });
  return out;
}

// (G · A, F · W); the first is empty where it is not needed.
template <typename From, typename T>
std::tuple<Tensor, Tensor> backward(const AffinityKernel<T, T>& kernel, const Tensor& grad_out, const Tensor& value,
                                    const Tensor& feat, bool need_value) {
  const int64_t B = feat.size(0), C = value.size(1), D = feat.size(1), N = feat.size(2);
  const int64_t feat_row = round_up(D, kernel.strip), channels = round_up(C, kChannels);
  const int64_t summed = need_value ? channels : 0;
  const Packed<T> out_feat(feat, B, N, feat_row), column_sums(feat, B, N, summed),
      row_sums(feat, B, N, summed * kUnit<T>);
  if (B * N > 0) {  // what is packed is freed before the gradients exist as tensors
    const Packed<T> panels(feat, B, N, D), strips(feat, B, N, feat_row), values(feat, B, N, channels),
        grads(feat, B, N, channels), units(feat, B, N, summed);
    std::vector<AffinityImage<T, T>> images;
    for (int64_t b = 0; b < B; ++b) {
      images.push_back({.feat = panels.at(b),
                        .summed = grads.at(b),
                        .units = units.at(b),
                        .column_sums = column_sums.at(b),
                        .row_sums = row_sums.at(b),
                        .value = values.at(b),
                        .feat_strips = strips.at(b),
                        .out_feat = out_feat.at(b),
                        .C = C,
                        .channels = channels,
                        .D = D,
                        .N = N});
    }
    for_each_block(B, N, [&](const Block& block) {
      pack_panels<From>(feat, block, panels.at(block), D, kernel.panel);
      pack_strips<From>(feat, block, strips.at(block), feat_row, kernel.strip);
      pack_panels<T>(value, block, values.at(block), channels, kBlock);
      pack_panels<T>(grad_out, block, grads.at(block), channels, kBlock);
      out_feat.zero(block);
      if (!need_value) return;
      pack_panels<T>(grad_out, block, units.at(block), channels, kUnit<T>);
      column_sums.zero(block);
      row_sums.zero(block);
    });
    Pairs<T, T>(kernel, images).run();
  }
  const Tensor grad_feat = torch::stable::new_empty(feat, {B, D, N});
  const Tensor grad_value =
      need_value ? torch::stable::new_empty(value, {B, C, N}) : torch::stable::new_empty(value, {0});
  for_each_block(B, N, [&](const Block& block) {
    unpack_strips<From>(out_feat.at(block), kernel.strip, block, grad_feat);
    if (need_value) unpack_sums(column_sums.at(block), row_sums.at(block), channels, block, grad_value);
  });
  return {grad_value, grad_feat};
}

void check(const Tensor& tensor, const char* name, const Tensor& feat) {
  STD_TORCH_CHECK(feat.dim() == 3, "feat must be [B, D, N], it has ", feat.dim(), " dimensions");
  STD_TORCH_CHECK(
      tensor.dim() == 3 && tensor.size(0) == feat.size(0) && tensor.size(2) == feat.size(2),
      name, " must be [B, C, N] with feat's B and N");
  STD_TORCH_CHECK(tensor.is_cpu() && feat.is_cpu(), name, " and feat must be on the CPU");
  const bool bf16 = feat.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      tensor.scalar_type() == (bf16 ? ScalarType::Float : feat.scalar_type()) &&
          (bf16 || feat.scalar_type() == ScalarType::Float || feat.scalar_type() == ScalarType::Double),
      name, " and feat must both be float32 or both float64, or feat bfloat16 and ", name, " float32");
}

Tensor relu_affinity_cpu(const Tensor& value, const Tensor& feat) {
  check(value, "value", feat);
  const Kernels& k = kernels(isa());
  switch (feat.scalar_type()) {
    case ScalarType::Double: return forward<double>(k.affinity_double, value, feat);
    case ScalarType::Float: return forward<float>(k.affinity_float, value, feat);
    default:
      return k.affinity_bf16.pair ? forward<uint16_t>(k.affinity_bf16, value, feat)
                                  : forward<uint16_t>(k.affinity_float, value, feat);
  }
}

std::tuple<Tensor, Tensor> relu_affinity_backward_cpu(
    const Tensor& grad_out, const Tensor& value, const Tensor& feat, bool need_value) {
  check(grad_out, "grad_out", feat);
  check(value, "value", feat);
  STD_TORCH_CHECK(grad_out.size(1) == value.size(1), "grad_out must have value's shape");
  const Kernels& k = kernels(isa());
  switch (feat.scalar_type()) {
    case ScalarType::Double: return backward<double>(k.affinity_double, grad_out, value, feat, need_value);
    case ScalarType::Float: return backward<float>(k.affinity_float, grad_out, value, feat, need_value);
    default: return backward<uint16_t>(k.affinity_float, grad_out, value, feat, need_value);
  }
}

}  // namespace
}  // namespace ercn

STABLE_TORCH_LIBRARY_FRAGMENT(ercn_native, m) {
  m.def("relu_affinity_cpu(Tensor value, Tensor feat) -> Tensor");
  m.def(
      "relu_affinity_backward_cpu(Tensor grad_out, Tensor value, Tensor feat, bool need_value)"
      " -> (Tensor grad_value, Tensor grad_feat)");
}

STABLE_TORCH_LIBRARY_IMPL(ercn_native, CPU, m) {
  m.impl("relu_affinity_cpu", TORCH_BOX(&ercn::relu_affinity_cpu));
  m.impl("relu_affinity_backward_cpu", TORCH_BOX(&ercn::relu_affinity_backward_cpu));
}
