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

// Pixels [n0, n0 + count) of image b, one block of it.
struct Block {
  int64_t b, n0, count;
};

// Runs body(block) for every block of every image, the same ones on the same thread each time: what it packed in the last
// call may still be in its cache. Padding blocks are not visited.
template <typename F>
void for_each_block(int64_t B, int64_t N, const F& body) {
  const int64_t blocks = round_up(N, kBlock) / kBlock;
  torch::stable::parallel_for(0, B * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n0 = task % blocks * kBlock;
      body(Block{task / blocks, n0, std::min(kBlock, N - n0)});
    }
  });
}

// Element (b, 0, n0) of a tensor [B, R, N].
template <typename T>
const T* at(const Tensor& tensor, const Block& block) {
  return static_cast<const T*>(tensor.const_data_ptr()) + block.b * tensor.stride(0) + block.n0 * tensor.stride(2);
}

constexpr int64_t kRowsAhead = 16;

// A block of source [B, R, N] -> [kBlock / panel, rows / SIDE, panel, SIDE]: SIDE rows of a pixel lie side by side.
// Padding pixels and rows become zeros.
template <typename From, int SIDE = 1, typename E>
void pack_panels(const Tensor& source, const Block& block, E* to, int64_t rows, int64_t panel) {
  const int64_t R = source.size(1), stride_r = source.stride(1), stride_n = source.stride(2);
  const From* from = at<From>(source, block);
  if (R < rows || block.count < kBlock) std::fill_n(to, kBlock * rows, E(0));
  for (int64_t n0 = 0; n0 < block.count; n0 += panel) {
    const int64_t real = std::min(panel, block.count - n0);
    const From* x = from + n0 * stride_n;
    E* base = to + n0 * rows;
    if (stride_n > stride_r) {  // in the order of memory
      for (int64_t n = 0; n < real; ++n) {
        for (int64_t r = 0; r < R; ++r) {
          base[r / SIDE * SIDE * panel + n * SIDE + r % SIDE] = convert<E>(x[r * stride_r + n * stride_n]);
        }
      }
      continue;
    }
    for (int64_t r = 0; r < R; r += SIDE) {
      const auto copy = [&](int64_t sides, int64_t stride) {
        for (int64_t side = 0; side < sides; ++side) {
          // Rows lie far apart, and their few lines do not wake the processor's own prefetching.
          const From* later = x + std::min(r + kRowsAhead + side, R - 1) * stride_r;
          for (int64_t n = 0; n < real; n += 64 / sizeof(From)) __builtin_prefetch(later + n * stride);
        }
        for (int64_t n = 0; n < real; ++n) {
          for (int64_t side = 0; side < sides; ++side) {
            base[r * panel + n * SIDE + side] = convert<E>(x[(r + side) * stride_r + n * stride]);
          }
        }
      };
      stride_n == 1 && R - r >= SIDE ? copy(SIDE, 1) : copy(std::min<int64_t>(R - r, SIDE), stride_n);
    }
  }
}

// A block of source [B, R, N] -> strips [rows / strip, kBlock, strip]; zeros as above.
template <typename From, typename T>
void pack_strips(const Tensor& source, const Block& block, T* to, int64_t rows, int64_t strip) {
  const int64_t R = source.size(1), stride_r = source.stride(1), stride_n = source.stride(2);
  const From* from = at<From>(source, block);
  if (R < rows || block.count < kBlock) std::fill_n(to, kBlock * rows, T(0));
  for (int64_t first = 0; first < R; first += strip) {
    const int64_t real = std::min(strip, R - first);
    const auto copy = [&](int64_t r, int64_t n) {
      to[first * kBlock + n * strip + r] = convert<T>(from[(first + r) * stride_r + n * stride_n]);
    };
    if (stride_n > stride_r) {
      for (int64_t n = 0; n < block.count; ++n) {
        for (int64_t r = 0; r < real; ++r) copy(r, n);
      }
    } else {
      for (int64_t r = 0; r < real; ++r) {
        for (int64_t n = 0; n < block.count; ++n) copy(r, n);
      }
    }
  }
}

// strips -> the block's part of [B, R, N] contiguous
template <typename To, typename T>
void unpack_strips(const T* from, int64_t strip, const Block& block, const Tensor& out) {
  const int64_t R = out.size(1), N = out.size(2);
  To* to = static_cast<To*>(out.mutable_data_ptr()) + block.b * R * N + block.n0;
  for (int64_t r = 0; r < R; ++r) {
    const T* row = from + r / strip * strip * kBlock + r % strip;
    for (int64_t n = 0; n < block.count; ++n) to[r * N + n] = convert<To>(row[n * strip]);
  }
}

// The block's part of [B, C, N] contiguous, from both of its sums.
template <typename T>
void unpack_sums(const T* columns, const T* rows, int64_t channels, const Block& block, const Tensor& out) {
  const int64_t C = out.size(1), N = out.size(2);
  T* to = static_cast<T*>(out.mutable_data_ptr()) + block.b * C * N + block.n0;
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t n = 0; n < block.count; ++n) {
      T sum = columns[c * kBlock + n];
      for (int64_t u = 0; u < kUnit<T>; ++u) sum += rows[(n * channels + c) * kUnit<T> + u];
      to[c * N + n] = sum;
    }
  }
}

template <typename T>
struct alignas(64) Scratch {  // a vector in two cache lines costs two accesses
  T numbers[2 * kBlock * kBlock];
};

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
    const std::unique_ptr<Scratch<T>> scratch(new Scratch<T>);
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = next.fetch_add(1)) < ring * per_round;) {
        const int64_t round = task / per_round, b = task % per_round % B;
        const auto [i, j] = schedule.pair(round, task % per_round / B);
        for (const int64_t block : {i, j}) {
          while (finished[b * ring + block].load(std::memory_order_acquire) < round) std::this_thread::yield();
        }
        if (j < schedule.blocks) kernel.pair(images[b], i, j, scratch->numbers);
        finished[b * ring + i].store(round + 1, std::memory_order_release);
        finished[b * ring + j].store(round + 1, std::memory_order_release);
      }
    }
  });
}

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

  // Of pixel n0, the first of a block, and what follows; null where nothing is kept.
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
                      .value = values.at(b),
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
  run_pairs(kernel, images);
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
  const Tensor grad_feat = torch::stable::new_empty(feat, {B, D, N});
  const Tensor grad_value =
      need_value ? torch::stable::new_empty(value, {B, C, N}) : torch::stable::new_empty(value, {0});
  if (B * N == 0) return {grad_value, grad_feat};
  const int64_t feat_row = round_up(D, kernel.strip), channels = round_up(C, kChannels);
  const int64_t summed = need_value ? channels : 0;
  const Packed<T> panels(feat, B, N, D), strips(feat, B, N, feat_row), out_feat(feat, B, N, feat_row),
      values(feat, B, N, channels), grads(feat, B, N, channels), units(feat, B, N, summed),
      column_sums(feat, B, N, summed), row_sums(feat, B, N, summed * kUnit<T>);
  std::vector<AffinityImage<T, T>> images;
  for (int64_t b = 0; b < B; ++b) {
    images.push_back({.feat = panels.at(b),
                      .value = values.at(b),
                      .grad = grads.at(b),
                      .units = units.at(b),
                      .column_sums = column_sums.at(b),
                      .row_sums = row_sums.at(b),
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
  run_pairs(kernel, images);
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
