// ReLU affinity on the CPU, registered as ercn_native::relu_affinity_cpu and …_backward_cpu (LibTorch stable ABI).
//   Y = V · A,  A = relu(FᵀF);   dV = G · A;   dF = F · W,  W = 1[FᵀF > 0] ⊙ (VᵀG + GᵀV)
// V, G [B, C, N] and F [B, D, N] in fp32 or fp64, any strides. A task owns a block of columns of one image, so
// there are no atomics and the result is the same for any number of threads. Extra memory: packed copies of the inputs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "features.h"
#include "relu_affinity_block.h"

namespace ercn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void affinity_block_avx2(
    const Panels<float>& p, int64_t block, float* out_rows, float* out_feat) {
  affinity_block(p, block, out_rows, out_feat);
}
__attribute__((target("avx2,fma"))) void affinity_block_avx2(
    const Panels<double>& p, int64_t block, double* out_rows, double* out_feat) {
  affinity_block(p, block, out_rows, out_feat);
}
#endif

template <typename T>
void affinity_block_portable(const Panels<T>& p, int64_t block, T* out_rows, T* out_feat) {
  affinity_block(p, block, out_rows, out_feat);
}

template <typename T>
using BlockFunction = void (*)(const Panels<T>&, int64_t, T*, T*);

template <typename T>
BlockFunction<T> choose_block_function() {
#if defined(__x86_64__)
  if (cpu_features().avx2 && cpu_features().fma) return affinity_block_avx2;
#endif
  return affinity_block_portable<T>;
}

int64_t block_count(int64_t N) { return (N + kBlock - 1) / kBlock; }

// [B, R, N], any strides -> [B, blocks, R, kBlock], zeros after column N.
template <typename T>
Tensor pack(const Tensor& source) {
  const int64_t B = source.size(0), R = source.size(1), N = source.size(2), blocks = block_count(N);
  const int64_t stride_b = source.stride(0), stride_r = source.stride(1), stride_n = source.stride(2);
  Tensor packed = torch::stable::new_empty(source, {B, blocks, R, kBlock});
  const T* from = source.const_data_ptr<T>();
  T* to = packed.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, B * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n0 = task % blocks * kBlock, columns = std::min(kBlock, N - n0);
      for (int64_t r = 0; r < R; ++r) {
        const T* row = from + task / blocks * stride_b + r * stride_r + n0 * stride_n;
        T* panel_row = to + (task * R + r) * kBlock;
        for (int64_t n = 0; n < columns; ++n) panel_row[n] = row[n * stride_n];
        std::fill(panel_row + columns, panel_row + kBlock, T(0));
      }
    }
  });
  return packed;
}

// panel [R, kBlock] -> columns [n0, …) of the contiguous image [R, N]
template <typename T>
void store(const std::vector<T>& panel, T* image, int64_t R, int64_t N, int64_t n0) {
  for (int64_t r = 0; r < R; ++r) {
    std::copy_n(panel.data() + r * kBlock, std::min(kBlock, N - n0), image + r * N + n0);
  }
}

// (rows · A, F · W). Forward gives no value and gets no F · W, backward may leave out rows · A; either is then empty.
template <typename T>
std::tuple<Tensor, Tensor> run(const Tensor& rows, const Tensor* value, const Tensor& feat, bool need_rows) {
  const int64_t B = feat.size(0), C = rows.size(1), D = feat.size(1), N = feat.size(2), blocks = block_count(N);
  const Tensor feat_panels = pack<T>(feat), rows_panels = pack<T>(rows);
  const Tensor value_panels = value ? pack<T>(*value) : rows_panels;
  const T *feat_data = feat_panels.const_data_ptr<T>(), *rows_data = rows_panels.const_data_ptr<T>();
  const T* value_data = value_panels.const_data_ptr<T>();

  const Tensor out_rows = need_rows ? torch::stable::new_empty(rows, {B, C, N}) : torch::stable::new_empty(rows, {0});
  const Tensor out_feat = value ? torch::stable::new_empty(feat, {B, D, N}) : torch::stable::new_empty(feat, {0});
  T* out_rows_data = out_rows.mutable_data_ptr<T>();
  T* out_feat_data = out_feat.mutable_data_ptr<T>();

  const BlockFunction<T> block_function = choose_block_function<T>();
  torch::stable::parallel_for(0, B * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> rows_sum(need_rows ? C * kBlock : 0), feat_sum(value ? D * kBlock : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, block = task % blocks;
      const Panels<T> panels{
          feat_data + b * blocks * D * kBlock,
          rows_data + b * blocks * C * kBlock,
          value_data + b * blocks * C * kBlock,
          C, D, N};
      std::fill(rows_sum.begin(), rows_sum.end(), T(0));
      std::fill(feat_sum.begin(), feat_sum.end(), T(0));
      block_function(panels, block, need_rows ? rows_sum.data() : nullptr, value ? feat_sum.data() : nullptr);
      if (need_rows) store(rows_sum, out_rows_data + b * C * N, C, N, block * kBlock);
      if (value) store(feat_sum, out_feat_data + b * D * N, D, N, block * kBlock);
    }
  });
  return {out_rows, out_feat};
}

void check(const Tensor& tensor, const char* name, const Tensor& feat) {
  STD_TORCH_CHECK(feat.dim() == 3, "feat must be [B, D, N], it has ", feat.dim(), " dimensions");
  STD_TORCH_CHECK(
      tensor.dim() == 3 && tensor.size(0) == feat.size(0) && tensor.size(2) == feat.size(2),
      name, " must be [B, C, N] with feat's B and N");
  STD_TORCH_CHECK(tensor.is_cpu() && feat.is_cpu(), name, " and feat must be on the CPU");
  STD_TORCH_CHECK(
      tensor.scalar_type() == feat.scalar_type() &&
          (feat.scalar_type() == ScalarType::Float || feat.scalar_type() == ScalarType::Double),
      name, " and feat must both be float32 or both float64");
}

Tensor relu_affinity_cpu(const Tensor& value, const Tensor& feat) {
  check(value, "value", feat);
  const auto result = feat.scalar_type() == ScalarType::Float ? run<float>(value, nullptr, feat, true)
                                                              : run<double>(value, nullptr, feat, true);
  return std::get<0>(result);
}

std::tuple<Tensor, Tensor> relu_affinity_backward_cpu(
    const Tensor& grad_out, const Tensor& value, const Tensor& feat, bool need_value) {
  check(grad_out, "grad_out", feat);
  check(value, "value", feat);
  STD_TORCH_CHECK(grad_out.size(1) == value.size(1), "grad_out must have value's shape");
  return feat.scalar_type() == ScalarType::Float ? run<float>(grad_out, &value, feat, need_value)
                                                 : run<double>(grad_out, &value, feat, need_value);
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
