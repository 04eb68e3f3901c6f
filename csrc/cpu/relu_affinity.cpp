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
#include <atomic>
#include <memory>
#include <optional>
#include <thread>
#include <tuple>
#include <vector>

#include "elements.h"
#include "kernels.h"
#include "schedule.h"

namespace ercn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Runs body(b, first pixel, pixels) for every block of every image; padding blocks are not visited.
template <typename F>
void for_each_block(int64_t B, int64_t N, const F& body) {
  const int64_t blocks = round_up(N, kBlock) / kBlock;
  torch::stable::parallel_for(0, B * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n0 = task % blocks * kBlock;
      body(task / blocks, n0, std::min(kBlock, N - n0));
    }
  });
}

// Visits rows [r0, r0 + R) of pixels [n0, n0 + count) of image b as body(r - r0, n - n0, value), in the order of
// memory.
template <typename T, typename F>
void visit(const Tensor& source, int64_t b, int64_t r0, int64_t R, int64_t n0, int64_t count, const F& body) {
  const int64_t stride_r = source.stride(1), stride_n = source.stride(2);
  const T* from =
      static_cast<const T*>(source.const_data_ptr()) + b * source.stride(0) + r0 * stride_r + n0 * stride_n;
  if (stride_n <= stride_r) {
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t n = 0; n < count; ++n) body(r, n, from[r * stride_r + n * stride_n]);
    }
  } else {
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t r = 0; r < R; ++r) body(r, n, from[r * stride_r + n * stride_n]);
    }
  }
}

// source [B, R, N] -> rows [r0, r0 + R) of panels [B, padded N / panel, rows / SIDE, panel, SIDE]: SIDE rows of a pixel
// lie side by side. Padding pixels and later rows become zeros, which a call for those rows may overwrite.
template <typename From, int SIDE = 1, typename E>
void pack_panels(const Tensor& source, E* to, int64_t rows, int64_t r0, int64_t panel) {
  const int64_t N = source.size(2), R = source.size(1), image = round_up(N, kBlock) * rows;
  for_each_block(source.size(0), N, [&](int64_t b, int64_t n0, int64_t count) {
    for (int64_t at = n0; at < n0 + kBlock; at += panel) {
      E* base = to + b * image + at * rows;
      const int64_t real = std::clamp<int64_t>(n0 + count - at, 0, panel);
      const auto row = [&](int64_t r) { return base + r / SIDE * SIDE * panel + r % SIDE; };
      visit<From>(source, b, 0, R, at, real,
                  [&](int64_t r, int64_t n, From x) { row(r0 + r)[n * SIDE] = convert<E>(x); });
      for (int64_t r = r0; r < rows; ++r) {
        for (int64_t n = r < r0 + R ? real : 0; n < panel; ++n) row(r)[n * SIDE] = E(0);
      }
    }
  });
}

// source [B, R, N] -> rows [r0, r0 + R) of strips [B, padded N / kBlock, rows / strip, kBlock, strip]; zeros as above.
// Either r0 is 0 or there is one strip.
template <typename From, typename T>
void pack_strips(const Tensor& source, T* to, int64_t rows, int64_t r0, int64_t strip) {
  const int64_t N = source.size(2), R = source.size(1), image = round_up(N, kBlock) * rows;
  for_each_block(source.size(0), N, [&](int64_t b, int64_t n0, int64_t count) {
    for (int64_t first = 0; first < rows; first += strip) {
      T* base = to + b * image + n0 * rows + first * kBlock + r0;
      const int64_t real = std::min(strip, R - first);
      visit<From>(source, b, first, real, n0, count,
                  [&](int64_t r, int64_t n, From x) { base[n * strip + r] = convert<T>(x); });
      for (int64_t n = 0; n < kBlock; ++n) {
        std::fill(base + n * strip + (n < count ? real : 0), base + (n + 1) * strip - r0, T(0));
      }
    }
  });
}

// strips -> [B, R, N] contiguous
template <typename To, typename T>
void unpack_strips(const T* from, int64_t rows, int64_t strip, const Tensor& out) {
  const int64_t B = out.size(0), R = out.size(1), N = out.size(2);
  To* to = static_cast<To*>(out.mutable_data_ptr());
  for_each_block(B, N, [&](int64_t b, int64_t n0, int64_t count) {
    for (int64_t r = 0; r < R; ++r) {
      const T* row = from + (b * round_up(N, kBlock) + n0) * rows + r / strip * strip * kBlock + r % strip;
      for (int64_t n = 0; n < count; ++n) to[(b * R + r) * N + n0 + n] = convert<To>(row[n * strip]);
    }
  });
}

// Zeros in the sums of every block, [B, padded N, rows] in any order.
template <typename T>
void zero(T* to, int64_t B, int64_t N, int64_t rows) {
  for_each_block(B, N, [&](int64_t b, int64_t n0, int64_t) {
    std::fill_n(to + (b * round_up(N, kBlock) + n0) * rows, kBlock * rows, T(0));
  });
}

// Every pair of blocks of every image, in the order of the rounds. A thread takes the next task and waits until its two
// blocks have finished the round before; tasks are taken in order, so the oldest never waits and there is no deadlock,
// whatever the number of threads.
template <typename E, typename T>
void run_pairs(const AffinityKernel<E, T>& kernel, const std::vector<AffinityImage<E, T>>& images) {
  const int64_t B = images.size(), N = images[0].N;
  const TriangleSchedule schedule{round_up(N, kBlock) / kBlock};
  const int64_t ring = schedule.ring(), per_round = schedule.tasks_per_round() * B;
  const auto finished = std::make_unique<std::atomic<int64_t>[]>(B * ring);  // rounds, of each block
  for (int64_t k = 0; k < B * ring; ++k) finished[k].store(0, std::memory_order_relaxed);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique<T[]>(2 * kBlock * kBlock);
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = next.fetch_add(1)) < ring * per_round;) {
        const int64_t round = task / per_round, b = task % per_round % B;
        const auto [i, j] = schedule.pair(round, task % per_round / B);
        for (const int64_t block : {i, j}) {
          while (finished[b * ring + block].load(std::memory_order_acquire) < round) std::this_thread::yield();
        }
        if (j < schedule.blocks) kernel.pair(images[b], i, j, scratch.get());
        finished[b * ring + i].store(round + 1, std::memory_order_release);
        finished[b * ring + j].store(round + 1, std::memory_order_release);
      }
    }
  });
}

template <typename T>
constexpr ScalarType scalar_type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// A tensor is the memory, so that torch's allocator sees it; `count` elements of T.
template <typename T>
Tensor buffer(const Tensor& like, int64_t count) {
  const ScalarType type = std::is_same_v<T, uint16_t> ? ScalarType::BFloat16 : scalar_type<T>;
  return torch::stable::new_empty(like, {count}, type);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// From: feat's element in memory, E: in the panels, T: of all else.
template <typename From, typename E, typename T>
Tensor forward(const AffinityKernel<E, T>& kernel, const Tensor& value, const Tensor& feat) {
  const int64_t B = feat.size(0), C = value.size(1), D = feat.size(1), N = feat.size(2);
  const Tensor out = torch::stable::new_empty(value, {B, C, N});
  if (B * C * N == 0) return out;
  constexpr int side = sizeof(E) == 2 ? 2 : 1;
  const int64_t padded = round_up(N, kBlock), depth = round_up(D, side), row = round_up(C, kRowSlack);
  const Tensor panels = buffer<E>(feat, B * padded * depth);
  const Tensor value_rows = buffer<T>(feat, B * padded * row), out_rows = buffer<T>(feat, B * padded * row);
  pack_panels<From, side>(feat, data<E>(panels), depth, 0, kernel.panel);
  pack_strips<T>(value, data<T>(value_rows), row, 0, row);
  zero(data<T>(out_rows), B, N, row);
  std::vector<AffinityImage<E, T>> images;
  for (int64_t b = 0; b < B; ++b) {
    images.push_back({data<E>(panels) + b * padded * depth, data<T>(value_rows) + b * padded * row, nullptr, nullptr,
                      data<T>(out_rows) + b * padded * row, nullptr, C, D, N, row, row});
  }
  run_pairs(kernel, images);
  unpack_strips<T>(data<T>(out_rows), row, row, out);
  return out;
}

// (G · A, F · W); the first is empty where it is not needed.
template <typename From, typename T>
std::tuple<Tensor, Tensor> backward(const AffinityKernel<T, T>& kernel, const Tensor& grad_out, const Tensor& value,
                                    const Tensor& feat, bool need_value) {
  const int64_t B = feat.size(0), C = value.size(1), D = feat.size(1), N = feat.size(2), padded = round_up(N, kBlock);
  const int64_t feat_row = round_up(D, kernel.strip), out_row = round_up(C, kRowSlack), value_row = C + out_row;
  const Tensor out_feat = buffer<T>(feat, B * padded * feat_row);
  const Tensor out_rows = buffer<T>(feat, need_value ? B * padded * out_row : 0);
  if (B * N > 0) {
    const Tensor feat_panels = buffer<T>(feat, B * padded * D), feat_strips = buffer<T>(feat, B * padded * feat_row);
    const Tensor value_rows = buffer<T>(feat, B * padded * value_row),
                 pair_panels = buffer<T>(feat, B * padded * 2 * C);
    pack_panels<From>(feat, data<T>(feat_panels), D, 0, kernel.panel);
    pack_strips<From>(feat, data<T>(feat_strips), feat_row, 0, kernel.strip);
    pack_strips<T>(value, data<T>(value_rows), value_row, 0, value_row);
    pack_strips<T>(grad_out, data<T>(value_rows), value_row, C, value_row);
    pack_panels<T>(grad_out, data<T>(pair_panels), 2 * C, 0, kernel.panel);
    pack_panels<T>(value, data<T>(pair_panels), 2 * C, C, kernel.panel);
    zero(data<T>(out_feat), B, N, feat_row);
    if (need_value) zero(data<T>(out_rows), B, N, out_row);
    std::vector<AffinityImage<T, T>> images;
    for (int64_t b = 0; b < B; ++b) {
      const int64_t n = b * padded;
      images.push_back({data<T>(feat_panels) + n * D, data<T>(value_rows) + n * value_row,
                        data<T>(pair_panels) + n * 2 * C, data<T>(feat_strips) + n * feat_row,
                        need_value ? data<T>(out_rows) + n * out_row : nullptr, data<T>(out_feat) + n * feat_row, C, D,
                        N, value_row, out_row});
    }
    run_pairs(kernel, images);
  }
  const Tensor grad_feat = torch::stable::new_empty(feat, {B, D, N});
  unpack_strips<From>(data<T>(out_feat), feat_row, kernel.strip, grad_feat);
  if (!need_value) return {torch::stable::new_empty(value, {0}), grad_feat};
  const Tensor grad_value = torch::stable::new_empty(value, {B, C, N});
  unpack_strips<T>(data<T>(out_rows), out_row, out_row, grad_value);
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
