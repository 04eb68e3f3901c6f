// ReLU affinity on the CPU: ercn::relu_affinity and …_backward (LibTorch stable ABI).
//   Y = V · A,  A = relu(FᵀF);   dV = G · A;   dF = F · W,  W = 1[FᵀF > 0] ⊙ (VᵀG + GᵀV)
// V, G [B, C, N] and F [B, D, N], any strides. Sums are fp64 where an input is, else fp32; the kernels read F in that
// type or in bf16 beside fp32, and other types are converted first. A and W are symmetric: only blocks on one side of
// the diagonal are formed, and each serves its rows and its columns. pairs.h says why the result does not depend on
// threads. Extra memory: packed copies of the inputs and the outputs' sums, O(B · N · (C + D)).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../../backend.h"
#include "../kernels.h"
#include "packing.h"
#include "pairs.h"

namespace ercn {
namespace {

// `width` numbers of every pixel of whole blocks, a piece of a workspace.
template <typename T>
class Packed {
 public:
  Packed(Workspace& memory, int64_t B, int64_t N, int64_t width) : image_(round_up(N, kBlock) * width), width_(width) {
    memory.reserve(numbers_, B * image_);
  }
  Packed(const Packed&) = delete;  // the workspace knows where numbers_ is

  // The numbers of image b from pixel n0 on, the first of a block; null where the width is 0.
  T* at(int64_t b, int64_t n0 = 0) const { return width_ ? numbers_ + b * image_ + n0 * width_ : nullptr; }
  T* at(const Block& block) const { return at(block.b, block.n0); }
  void zero(const Block& block) const { std::fill_n(at(block), kBlock * width_, T(0)); }

 private:
  const int64_t image_, width_;
  T* numbers_;
};

// From: feat's element in memory, E: feat's element in the panels, T: the element of all else.
template <typename From, typename E, typename T>
Tensor forward(const AffinityKernel<E, T>& kernel, const Tensor& value, const Tensor& feat) {
  const int64_t B = feat.size(0), C = value.size(1), D = feat.size(1), N = feat.size(2);
  const Tensor out = torch::stable::new_empty(value, {B, C, N});
  if (B * C * N == 0) return out;
  constexpr int side = sizeof(E) == 2 ? 2 : 1;
  const int64_t depth = round_up(D, side), channels = round_up(C, kChannelMultiple);
  Workspace workspace;
  WorkerScratch<T> scratch;
  const Packed<E> panels(workspace, B, N, depth);
  const Packed<T> values(workspace, B, N, channels), units(workspace, B, N, channels);
  const Packed<T> column_sums(workspace, B, N, channels), row_sums(workspace, B, N, channels * kUnit<T>);
  workspace.reserve(scratch, kPairScratch);
  workspace.allocate(feat);
  std::vector<AffinityImage<E, T>> images;
  for (int64_t b = 0; b < B; ++b) {
    images.push_back(
        {.feat = panels.at(b),
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
  Pairs<E, T>(kernel, images, scratch).run();
  for_each_block(B, N, [&](const Block& block) {
    unpack_sums(column_sums.at(block), row_sums.at(block), channels, block, out);
  });
  return out;
}

// (G · A, F · W); the first is empty where it is not needed.
template <typename From, typename T>
std::tuple<Tensor, Tensor> backward(
    const AffinityKernel<T, T>& kernel, const Tensor& grad_out, const Tensor& value, const Tensor& feat,
    bool need_value) {
  const int64_t B = feat.size(0), C = value.size(1), D = feat.size(1), N = feat.size(2);
  const int64_t feat_row = round_up(D, kernel.strip), channels = round_up(C, kChannelMultiple);
  const int64_t summed = need_value ? channels : 0;
  Workspace sums;
  const Packed<T> out_feat(sums, B, N, feat_row), column_sums(sums, B, N, summed);
  const Packed<T> row_sums(sums, B, N, summed * kUnit<T>);
  sums.allocate(feat);
  if (B * N > 0) {  // the packed operands are freed before the gradients are allocated
    Workspace packed;
    WorkerScratch<T> scratch;
    const Packed<T> panels(packed, B, N, D), strips(packed, B, N, feat_row);
    const Packed<T> values(packed, B, N, channels), grads(packed, B, N, channels), units(packed, B, N, summed);
    packed.reserve(scratch, kPairScratch);
    packed.allocate(feat);
    std::vector<AffinityImage<T, T>> images;
    for (int64_t b = 0; b < B; ++b) {
      images.push_back(
          {.feat = panels.at(b),
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
    Pairs<T, T>(kernel, images, scratch).run();
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

bool is_floating(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Float8_e5m2:
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2fnuz:
    case ScalarType::Float8_e4m3fnuz: return true;
    default: return false;
  }
}

void check(const Tensor& tensor, const char* name, const Tensor& feat) {
  STD_TORCH_CHECK(feat.dim() == 3, "feat must be [B, D, N], it has ", feat.dim(), " dimensions");
  STD_TORCH_CHECK(
      tensor.dim() == 3 && tensor.size(0) == feat.size(0) && tensor.size(2) == feat.size(2), name,
      " must be [B, C, N] with feat's B and N");
  STD_TORCH_CHECK(tensor.is_cpu() && feat.is_cpu(), name, " and feat must be on the CPU");
  STD_TORCH_CHECK(
      is_floating(tensor.scalar_type()) && is_floating(feat.scalar_type()), name, " and feat must be floating point");
}

Tensor relu_affinity(const Tensor& value, const Tensor& feat, const std::string& backend) {
  check_backend(backend, "cpu");
  check(value, "value", feat);
  const Kernels& k = kernels(isa());
  const ScalarType sums = type_of_sums(value, feat);
  const Tensor v = converted(value, sums), f = accepted(feat, sums);
  switch (f.scalar_type()) {
    case ScalarType::Double: return forward<double>(k.affinity_double, v, f);
    case ScalarType::Float: return forward<float>(k.affinity_float, v, f);
    default:
      return k.affinity_bf16.pair ? forward<uint16_t>(k.affinity_bf16, v, f)
                                  : forward<uint16_t>(k.affinity_float, v, f);
  }
}

std::tuple<Tensor, Tensor> relu_affinity_backward(
    const Tensor& grad_out, const Tensor& value, const Tensor& feat, bool need_value, const std::string& backend) {
  check_backend(backend, "cpu");
  check(grad_out, "grad_out", feat);
  check(value, "value", feat);
  STD_TORCH_CHECK(grad_out.size(1) == value.size(1), "grad_out must have value's shape");
  const Kernels& k = kernels(isa());
  const ScalarType sums = type_of_sums(value, feat);
  const Tensor g = converted(grad_out, sums), v = converted(value, sums), f = accepted(feat, sums);
  const std::tuple<Tensor, Tensor> grads = [&] {
    switch (f.scalar_type()) {
      case ScalarType::Double: return backward<double>(k.affinity_double, g, v, f, need_value);
      case ScalarType::Float: return backward<float>(k.affinity_float, g, v, f, need_value);
      default: return backward<uint16_t>(k.affinity_float, g, v, f, need_value);
    }
  }();
  return {converted(std::get<0>(grads), value.scalar_type()), converted(std::get<1>(grads), feat.scalar_type())};
}

}  // namespace
}  // namespace ercn

STABLE_TORCH_LIBRARY_IMPL(ercn, CPU, m) {
  m.impl("relu_affinity", TORCH_BOX(&ercn::relu_affinity));
  m.impl("relu_affinity_backward", TORCH_BOX(&ercn::relu_affinity_backward));
}
