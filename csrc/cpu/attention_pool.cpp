// Gated attention pooling on the CPU: ercn::gated_attention_pool and …_backward, attention_scores, pool_by_scores and
// …_backward (LibTorch stable ABI).
//   s = w · (drop(act(V h + b_V)) ⊙ drop(σ(U h + b_U))) + b_w,  a = softmax(s),  z = Σ a h
// The kernels take h, the weights and grad_pooled in fp32, fp64 or bf16 of one type, or h in bf16 beside fp32, with any
// strides; other types are converted first. Sums, scores and the kernels' gradients of the weights are fp32 (fp64 for
// fp64).
//
// All bags' instances are one row of numbers, cut into chunks whatever the bags; segments are the bags' shares of
// chunks. Chunks, superblocks and the order of every sum depend on the shapes and on the mask alone, so results do not
// depend on threads. Extra memory, T instances: forward, packed weights and T · K · D / 64 for the segments' shares of
// z; backward, weights packed twice, dp of one superblock (4 MiB, at least one chunk) and 2 · T · K of attention and
// dots.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../backend.h"
#include "convert.h"
#include "elements.h"
#include "kernels.h"

namespace ercn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kDpBytes = 4 << 20;  // of a superblock: with its rows of h it stays in the last level of cache

const PoolKernel<float, float, float>& kernel_of(float, float, float) { return kernels(isa()).pool_float; }
const PoolKernel<double, double, double>& kernel_of(double, double, double) { return kernels(isa()).pool_double; }
const PoolKernel<uint16_t, float, uint16_t>& kernel_of(uint16_t, float, uint16_t) { return kernels(isa()).pool_bf16; }
const PoolKernel<uint16_t, float, float>& kernel_of(uint16_t, float, float) { return kernels(isa()).pool_mixed; }

ScalarType sums_of(const Tensor& h) {
  return h.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Instances, their mask and their bags.
struct Instances {
  const Tensor& h;
  const Optional &mask, &cu_seqlens;

  int64_t dim() const { return h.size(cu_seqlens ? 1 : 2); }
  int64_t bags() const { return cu_seqlens ? cu_seqlens->size(0) - 1 : h.size(0); }
};

struct Inputs : Instances {
  const Tensor& v_weight;
  const Optional &v_bias, &u_weight, &u_bias;
  const Tensor& w_weight;
  const Optional &w_bias, &seed;
  double dropout_p;
  const std::string& activation;
};

// The key and its schedule, and the threshold, which rounds half to even as Python's round does.
std::optional<Dropout> dropout_of(const Inputs& in) {
  if (!in.seed) return std::nullopt;
  const uint64_t seed = *static_cast<const int64_t*>(in.seed->const_data_ptr());
  Dropout dropout;
  for (uint32_t round = 0; round < 10; ++round) {
    dropout.keys[round][0] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
    dropout.keys[round][1] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
  }
  dropout.threshold = static_cast<int32_t>(std::nearbyint(in.dropout_p * 65536));
  dropout.scale = dropout.threshold < 65536 ? 65536.0 / (65536 - dropout.threshold) : 0;
  return dropout;
}

Activation activation_of(const std::string& name) {
  if (name == "tanh") return Activation::tanh;
  if (name == "relu") return Activation::relu;
  STD_TORCH_CHECK(name == "gelu", "activation must be tanh, relu or gelu");
  return Activation::gelu;
}

// Uninitialized memory that is cut into pieces, each on a cache line of its own.
class Arena {
 public:
  template <typename T>
  void reserve(T*& piece, int64_t elements) {
    pieces_.push_back({reinterpret_cast<void**>(&piece), bytes_});
    bytes_ += round_up(elements * static_cast<int64_t>(sizeof(T)), 64);
  }
  void allocate() {
    memory_.reset(static_cast<char*>(::operator new(bytes_, std::align_val_t(64))));
    for (const auto& [piece, offset] : pieces_) *piece = memory_.get() + offset;
  }

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  std::vector<std::pair<void**, int64_t>> pieces_;
  int64_t bytes_ = 0;
  std::unique_ptr<char, Free> memory_;
};

// Runs body(task, worker) for every task, each thread taking the next; workers number the threads.
template <typename F>
void for_each_task(int64_t tasks, const F& body) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task, worker);
    }
  });
}

template <typename E>
Matrix<E> matrix(const Tensor& x) {
  return {static_cast<const E*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

// The bags, as ends within the list of real instances, and that list.
struct Bags {
  std::vector<int64_t> ends, real;
  int64_t total;  // instances that are real
};

template <typename Index>
std::vector<int64_t> ends_of(const Tensor& cu_seqlens, int64_t total) {
  const Index* bounds = static_cast<const Index*>(cu_seqlens.const_data_ptr());
  std::vector<int64_t> ends(cu_seqlens.size(0) - 1);
  int64_t begin = bounds[0];
  bool fits = begin == 0;
  for (size_t b = 0; b < ends.size(); ++b) {
    ends[b] = bounds[(b + 1) * cu_seqlens.stride(0)];
    fits = fits && begin <= ends[b];
    begin = ends[b];
  }
  STD_TORCH_CHECK(fits && begin == total, "cu_seqlens must rise from 0 to T = ", total, " without falling");
  return ends;
}

Bags bags_of(const Instances& in) {
  Bags bags;
  if (in.cu_seqlens) {
    const Tensor& bounds = *in.cu_seqlens;
    bags.total = in.h.size(0);
    bags.ends = bounds.scalar_type() == ScalarType::Int ? ends_of<int32_t>(bounds, bags.total)
                                                        : ends_of<int64_t>(bounds, bags.total);
    return bags;
  }
  const int64_t B = in.h.size(0), N = in.h.size(1);
  bags.ends.resize(B);
  for (int64_t b = 0; b < B; ++b) bags.ends[b] = (b + 1) * N;
  bags.total = B * N;
  if (in.mask) {
    const Matrix<bool> mask = matrix<bool>(*in.mask);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t n = 0; n < N; ++n) {
        if (mask.at[b * mask.row + n * mask.col]) bags.real.push_back(b * N + n);
      }
      bags.ends[b] = bags.real.size();
    }
    bags.total = bags.real.size();
  }
  return bags;
}

// Chunks of equal size, and their segments.
struct Chunks {
  int64_t size, count;
  std::vector<Segment> segments;
  std::vector<int64_t> first_segment;  // of each chunk, and one past the last

  explicit Chunks(const Bags& bags) {
    size = std::clamp(round_up((bags.total + 15) / 16, 8), int64_t{8}, kMaxChunk);
    count = (bags.total + size - 1) / size;
    int64_t begin = 0;
    for (size_t bag = 0; bag < bags.ends.size(); ++bag) {
      while (begin < bags.ends[bag]) {
        const int64_t end = std::min(bags.ends[bag], begin / size * size + size);
        if (begin % size == 0) first_segment.push_back(segments.size());
        segments.push_back({begin, end - begin, static_cast<int64_t>(bag)});
        begin = end;
      }
    }
    first_segment.push_back(segments.size());
  }
};

// What all have in common: instances, heads, and segments.
template <typename E, typename T, typename W>
Pool<E, T, W> describe(const Instances& in, int64_t heads, const Bags& bags, const Chunks& chunks) {
  const bool ragged = in.cu_seqlens.has_value();
  Pool<E, T, W> p{};
  p.h = static_cast<const E*>(in.h.const_data_ptr());
  p.N = in.h.size(ragged ? 0 : 1);
  p.stride_b = ragged ? 0 : in.h.stride(0);
  p.stride_n = in.h.stride(ragged ? 0 : 1);
  p.stride_d = in.h.stride(ragged ? 1 : 2);
  if (ragged || in.h.size(0) == 1) p.stride_b = p.N * p.stride_n;
  p.real = in.mask ? bags.real.data() : nullptr;
  p.D = in.dim();
  p.K = heads;
  p.bags = bags.ends.size();
  p.segments = chunks.segments.data();
  return p;
}

// And the hidden units.
template <typename E, typename T, typename W>
Pool<E, T, W> describe(const Inputs& in, const Bags& bags, const Chunks& chunks, const PoolKernel<E, T, W>& kernel,
                       const std::optional<Dropout>& dropout) {
  Pool<E, T, W> p = describe<E, T, W>(in, in.w_weight.size(0), bags, chunks);
  p.L = in.v_weight.size(0);
  p.branches = in.u_weight ? 2 : 1;
  p.units = round_up(p.L, std::max<int64_t>(2 / p.branches * kernel.lanes, 8));
  p.v = matrix<W>(in.v_weight);
  p.u = in.u_weight ? matrix<W>(*in.u_weight) : p.v;
  p.activation = activation_of(in.activation);
  p.dropout = dropout ? &*dropout : nullptr;
  return p;
}

template <typename E, typename T, typename W>
int64_t panels_of(const Pool<E, T, W>& p, const PoolKernel<E, T, W>& kernel) {
  return p.units * p.branches / (2 * kernel.lanes);
}

template <typename E, typename T, typename W>
void reserve_weights(Arena& arena, Pool<E, T, W>& p, const PoolKernel<E, T, W>& kernel) {
  char*& projections = reinterpret_cast<char*&>(p.projections);
  arena.reserve(projections, p.branches * p.units * round_up(p.D, 2) * kernel.operand_bytes);
  arena.reserve(p.biases, p.branches * p.units);
  arena.reserve(p.w, p.K * p.units);
  arena.reserve(p.w_bias, p.K);
}

// The small operands; the panels are packed by tasks.
template <typename E, typename T, typename W>
void pack_small(const Inputs& in, const Pool<E, T, W>& p, const PoolKernel<E, T, W>& kernel) {
  const auto bias = [&](const Optional& source, int64_t l) {
    if (!source || l >= p.L) return T(0);
    return convert<T>(static_cast<const W*>(source->const_data_ptr())[l * source->stride(0)]);
  };
  for (int64_t l = 0; l < p.units; ++l) {
    if (p.branches == 1) {
      p.biases[l] = bias(in.v_bias, l);
    } else {
      T* to = p.biases + l / kernel.lanes * 2 * kernel.lanes + l % kernel.lanes;
      to[0] = bias(in.v_bias, l);
      to[kernel.lanes] = bias(in.u_bias, l);
    }
  }
  const Matrix<W> w = matrix<W>(in.w_weight);
  for (int64_t k = 0; k < p.K; ++k) {
    for (int64_t l = 0; l < p.units; ++l)
      p.w[k * p.units + l] = l < p.L ? convert<T>(w.at[k * w.row + l * w.col]) : T(0);
    p.w_bias[k] =
        in.w_bias ? convert<T>(static_cast<const W*>(in.w_bias->const_data_ptr())[k * in.w_bias->stride(0)]) : T(0);
  }
}

// Softmax over a bag from its segments' parts: calls add(segment, exp(its max - bag's max)) in order, and gives the
// bag's sum.
template <typename E, typename T, typename W, typename F>
double join(const Pool<E, T, W>& p, int64_t begin, int64_t end, int64_t k, const F& add) {
  T most = -std::numeric_limits<T>::infinity();
  for (int64_t s = begin; s < end; ++s) most = std::max(most, p.part_max[s * p.K + k]);
  if (most == -std::numeric_limits<T>::infinity()) most = 0;
  double sum = 0;
  for (int64_t s = begin; s < end; ++s) {
    const T own = p.part_max[s * p.K + k];
    // A part whose scores are all -Inf holds zeros, or NaN.
    const double scale = own == -std::numeric_limits<T>::infinity() ? 1 : std::exp(static_cast<double>(own) - most);
    sum += scale * p.part_sum[s * p.K + k];
    add(s, scale);
  }
  return sum;
}

// First segment of every bag, and one past the last.
template <typename E, typename T, typename W>
std::vector<int64_t> segments_of_bags(const Pool<E, T, W>& p, const Chunks& chunks) {
  std::vector<int64_t> first(p.bags + 1);
  int64_t s = 0, segments = chunks.segments.size();
  for (int64_t bag = 0; bag <= p.bags; ++bag) {
    while (s < segments && chunks.segments[s].bag < bag) ++s;
    first[bag] = s;
  }
  return first;
}

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename E, typename T, typename W>
void reserve_parts(Arena& arena, Pool<E, T, W>& p, int64_t segments) {
  arena.reserve(p.part_max, segments * p.K);
  arena.reserve(p.part_sum, segments * p.K);
}

// pooled from the segments' parts, in the order of a bag's segments.
template <typename E, typename T, typename W>
void join_parts(const Pool<E, T, W>& p, const Chunks& chunks, W* out) {
  const std::vector<int64_t> first = segments_of_bags(p, chunks);
  const int64_t blocks = (p.D + 255) / 256, segments = chunks.segments.size();
  const auto join_block = [&](int64_t task) {
    const int64_t bag = task / blocks / p.K, k = task / blocks % p.K, d0 = task % blocks * 256;
    const int64_t columns = std::min<int64_t>(256, p.D - d0);
    double z[256] = {};
    const double sum = join(p, first[bag], first[bag + 1], k, [&](int64_t s, double scale) {
      const T* part = p.part_pooled + (s * p.K + k) * p.D + d0;
      for (int64_t d = 0; d < columns; ++d) z[d] += scale * part[d];
    });
    const bool empty = first[bag] == first[bag + 1];
    for (int64_t d = 0; d < columns; ++d)
      out[(bag * p.K + k) * p.D + d0 + d] = convert<W>(static_cast<T>(empty ? 0 : z[d] / sum));
  };
  // Joining one block takes about 256 additions for every segment of its bag.
  const int64_t grain = 1 + (int64_t{1} << 17) * std::max<int64_t>(p.bags, 1) / (256 * (segments + 1));
  torch::stable::parallel_for(0, p.bags * p.K * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) join_block(task);
  });
}

// The scores, and into `pooled`, unless it is null, z.
template <typename E, typename T, typename W>
Tensor forward(const Inputs& in, const Tensor* pooled) {
  const PoolKernel<E, T, W>& kernel = kernel_of(E{}, T{}, W{});
  const Bags bags = bags_of(in);
  const Chunks chunks(bags);
  const std::optional<Dropout> dropout = dropout_of(in);
  Pool<E, T, W> p = describe(in, bags, chunks, kernel, dropout);
  Tensor scores = in.cu_seqlens ? torch::stable::new_empty(in.h, {p.K, p.N}, sums_of(in.h))
                                : torch::stable::new_empty(in.h, {p.bags, p.K, p.N}, sums_of(in.h));
  p.scores = data<T>(scores);
  if (in.mask) torch::stable::fill_(scores, -std::numeric_limits<double>::infinity());

  Arena arena;
  reserve_weights(arena, p, kernel);
  const int64_t segments = chunks.segments.size(), scratch_bytes = round_up(kernel.chunk_scratch(p), 64);
  if (pooled) {
    reserve_parts(arena, p, segments);
    arena.reserve(p.part_pooled, segments * p.K * p.D);
  }
  char* scratch;
  arena.reserve(scratch, scratch_bytes * torch::stable::get_num_threads());
  arena.allocate();

  pack_small(in, p, kernel);
  for_each_task(chunks.count > 0 ? panels_of(p, kernel) : 0,
                [&](int64_t panel, int64_t) { kernel.pack_projection(p, panel); });
  for_each_task(chunks.count, [&](int64_t chunk, int64_t worker) {
    kernel.forward(p, chunks.first_segment[chunk], chunks.first_segment[chunk + 1], scratch + worker * scratch_bytes);
  });
  if (pooled) join_parts(p, chunks, data<W>(*pooled));
  return scores;
}

template <typename E, typename T>
void pool(const Instances& in, const Tensor& scores, const Tensor& pooled) {
  const PoolKernel<E, T, E>& kernel = kernel_of(E{}, T{}, E{});
  const Bags bags = bags_of(in);
  const Chunks chunks(bags);
  Pool<E, T, E> p = describe<E, T, E>(in, pooled.size(1), bags, chunks);
  p.scores = const_cast<T*>(static_cast<const T*>(scores.const_data_ptr()));
  Arena arena;
  const int64_t segments = chunks.segments.size(), scratch_bytes = round_up(kernel.chunk_scratch(p), 64);
  reserve_parts(arena, p, segments);
  arena.reserve(p.part_pooled, segments * p.K * p.D);
  char* scratch;
  arena.reserve(scratch, scratch_bytes * torch::stable::get_num_threads());
  arena.allocate();
  for_each_task(chunks.count, [&](int64_t chunk, int64_t worker) {
    kernel.pool(p, chunks.first_segment[chunk], chunks.first_segment[chunk + 1], scratch + worker * scratch_bytes);
  });
  join_parts(p, chunks, data<E>(pooled));
}

// The gradient of pooled in rows of whole panels, and what each segment has of the softmax's gradient.
template <typename T>
struct SoftmaxParts {
  T *grad_pooled, *scale, *bag_dot;

  template <typename E, typename W>
  void reserve(Arena& arena, Pool<E, T, W>& p, int64_t segments, int64_t instances, int64_t columns, bool dots) {
    arena.reserve(grad_pooled, p.bags * p.K * columns);
    reserve_parts(arena, p, segments);
    arena.reserve(p.part_dot, segments * p.K);
    arena.reserve(scale, segments * p.K);
    arena.reserve(bag_dot, p.bags * p.K);
    if (dots) arena.reserve(p.dots, instances * p.K);
    arena.reserve(p.attention, instances * p.K);
  }

  template <typename E, typename W>
  void form(Pool<E, T, W>& p, const PoolKernel<E, T, W>& kernel, const Chunks& chunks, const Tensor& from_pooled,
            int64_t columns, char* scratch, int64_t scratch_bytes) {
    const W* from = static_cast<const W*>(from_pooled.const_data_ptr());
    const int64_t stride_b = from_pooled.stride(0), stride_k = from_pooled.stride(1), stride_d = from_pooled.stride(2);
    for (int64_t row = 0; row < p.bags * p.K; ++row) {
      for (int64_t d = 0; d < columns; ++d) {
        grad_pooled[row * columns + d] =
            d < p.D ? convert<T>(from[row / p.K * stride_b + row % p.K * stride_k + d * stride_d]) : T(0);
      }
    }
    p.grad_pooled = grad_pooled, p.part_scale = scale, p.bag_dot = bag_dot;
    for_each_task(chunks.count, [&](int64_t chunk, int64_t worker) {
      kernel.dots(p, chunks.first_segment[chunk], chunks.first_segment[chunk + 1], scratch + worker * scratch_bytes);
    });
    const std::vector<int64_t> first = segments_of_bags(p, chunks);
    for (int64_t bag = 0; bag < p.bags; ++bag) {
      for (int64_t k = 0; k < p.K; ++k) {
        double dot = 0;
        const double sum = join(p, first[bag], first[bag + 1], k, [&](int64_t s, double own) {
          dot += own * p.part_dot[s * p.K + k];
          scale[s * p.K + k] = static_cast<T>(own);
        });
        for (int64_t s = first[bag]; s < first[bag + 1]; ++s) scale[s * p.K + k] /= sum;
        bag_dot[bag * p.K + k] = static_cast<T>(dot / sum);
      }
    }
  }
};

template <typename E, typename T>
std::tuple<Tensor, Tensor> pool_backward(const Instances& in, const Tensor& grad_pooled, const Tensor& scores,
                                         bool need_scores, bool need_value) {
  const PoolKernel<E, T, E>& kernel = kernel_of(E{}, T{}, E{});
  const Bags bags = bags_of(in);
  const Chunks chunks(bags);
  Pool<E, T, E> p = describe<E, T, E>(in, grad_pooled.size(1), bags, chunks);
  p.scores = const_cast<T*>(static_cast<const T*>(scores.const_data_ptr()));
  const auto made = [&](bool need, std::initializer_list<int64_t> ragged, std::initializer_list<int64_t> dense,
                        ScalarType type) {
    if (!need) return torch::stable::new_empty(in.h, {0}, type);
    Tensor x = torch::stable::new_empty(in.h, in.cu_seqlens ? ragged : dense, type);
    return in.mask ? torch::stable::fill_(x, 0) : x;
  };
  const Tensor grad_scores = made(need_scores, {p.K, p.N}, {p.bags, p.K, p.N}, sums_of(in.h));
  const Tensor grad_value = made(need_value, {p.N, p.D}, {p.bags, p.N, p.D}, in.h.scalar_type());
  if (need_scores) p.scores_grad = data<T>(grad_scores);
  if (need_value) p.grad_h = data<E>(grad_value);

  const int64_t columns = round_up(p.D, kernel.panel), segments = chunks.segments.size();
  const int64_t scratch_bytes = round_up(kernel.chunk_scratch(p), 64);
  Arena arena;
  SoftmaxParts<T> parts;
  parts.reserve(arena, p, segments, bags.total, columns, need_scores);
  char* scratch;
  arena.reserve(scratch, scratch_bytes * torch::stable::get_num_threads());
  arena.allocate();
  parts.form(p, kernel, chunks, grad_pooled, columns, scratch, scratch_bytes);
  for_each_task(chunks.count, [&](int64_t chunk, int64_t) {
    kernel.pool_backward(p, chunks.first_segment[chunk], chunks.first_segment[chunk + 1]);
  });
  return {grad_scores, grad_value};
}

enum Gradient { kH, kVWeight, kVBias, kUWeight, kUBias, kWWeight, kWBias };

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename E, typename T, typename W>
Gradients backward(const Optional& grad_pooled, const Optional& grad_scores, const Inputs& in, const Tensor& scores,
                   int64_t needs) {
  const PoolKernel<E, T, W>& kernel = kernel_of(E{}, T{}, W{});
  const Bags bags = bags_of(in);
  const Chunks chunks(bags);
  const std::optional<Dropout> dropout = dropout_of(in);
  Pool<E, T, W> p = describe(in, bags, chunks, kernel, dropout);
  const bool given[] = {
      true, true, in.v_bias.has_value(), in.u_weight.has_value(), in.u_bias.has_value(), true, in.w_bias.has_value()};
  const auto need = [&](Gradient which) { return given[which] && (needs >> which & 1) != 0; };
  const auto grad = [&](Gradient which, std::initializer_list<int64_t> sizes, bool h = false) {
    if (!need(which)) return torch::stable::new_empty(in.h, {0});
    Tensor made = torch::stable::new_empty(in.h, sizes, h ? in.h.scalar_type() : sums_of(in.h));
    return h && !in.mask && !in.cu_seqlens ? made : torch::stable::fill_(made, 0);  // no instance, no gradient
  };
  Tensor grad_h = in.cu_seqlens ? grad(kH, {p.N, p.D}, true) : grad(kH, {p.bags, p.N, p.D}, true);
  Tensor grad_v = grad(kVWeight, {p.L, p.D}), grad_v_bias = grad(kVBias, {p.L});
  Tensor grad_u = grad(kUWeight, {p.L, p.D}), grad_u_bias = grad(kUBias, {p.L});
  Tensor grad_w = grad(kWWeight, {p.K, p.L}), grad_w_bias = grad(kWBias, {p.K});

  p.scores = const_cast<T*>(static_cast<const T*>(scores.const_data_ptr()));
  if (need(kH)) p.grad_h = data<E>(grad_h);
  if (grad_scores) {
    const bool ragged = in.cu_seqlens.has_value();
    p.grad_scores = static_cast<const T*>(grad_scores->const_data_ptr());
    p.grad_scores_b = ragged ? 0 : grad_scores->stride(0);
    p.grad_scores_k = grad_scores->stride(ragged ? 0 : 1);
    p.grad_scores_n = grad_scores->stride(ragged ? 1 : 2);
  }

  const int64_t panels = round_up(p.D, kernel.panel) / kernel.panel, columns = panels * kernel.panel;
  const int64_t segments = chunks.segments.size(), scratch_bytes = round_up(kernel.chunk_scratch(p), 64);
  const int64_t dp_row_bytes = p.branches * p.units * sizeof(T);
  const int64_t chunks_per_block = std::max<int64_t>(
      1, std::min<int64_t>(chunks.count, kDpBytes / std::max<int64_t>(1, dp_row_bytes * chunks.size)));
  const int64_t block_rows = chunks_per_block * chunks.size, part_row = (2 + p.K) * p.units + p.K;
  p.dp_block = block_rows * kDpUnits + 16;  // a power of two would crowd the cache

  Arena arena;
  reserve_weights(arena, p, kernel);
  SoftmaxParts<T> softmax;
  T* weight_scratch;
  char* scratch;
  const int64_t workers = torch::stable::get_num_threads();
  if (need(kH)) arena.reserve(p.columns, p.branches * p.units * columns);
  if (grad_pooled) softmax.reserve(arena, p, segments, bags.total, columns, true);
  arena.reserve(p.dp, p.branches * p.units / kDpUnits * p.dp_block);
  arena.reserve(p.part_grads, chunks_per_block * part_row);
  arena.reserve(scratch, scratch_bytes * workers);
  arena.reserve(weight_scratch, kernel.weight_scratch * workers);
  arena.allocate();

  pack_small(in, p, kernel);
  const int64_t projections = chunks.count > 0 ? panels_of(p, kernel) : 0;
  for_each_task(projections + (need(kH) && chunks.count > 0 ? panels : 0), [&](int64_t task, int64_t) {
    if (task < projections) {
      kernel.pack_projection(p, task);
    } else {
      kernel.pack_columns(p, task - projections);
    }
  });
  if (grad_pooled) softmax.form(p, kernel, chunks, *grad_pooled, columns, scratch, scratch_bytes);

  // Sums over all instances of terms of either sign: in double, or what cancels would leave the rounding of what was
  // there.
  std::vector<double> totals(part_row);
  for (int64_t begin = 0; begin < chunks.count; begin += chunks_per_block) {
    const int64_t end = std::min(chunks.count, begin + chunks_per_block), first = begin * chunks.size;
    const int64_t rows = std::min(bags.total, end * chunks.size) - first;
    for_each_task(end - begin, [&](int64_t task, int64_t worker) {
      const int64_t chunk = begin + task;
      kernel.backward(p, chunks.first_segment[chunk], chunks.first_segment[chunk + 1], first, task,
                      scratch + worker * scratch_bytes);
    });
    for (int64_t part = 0; part < end - begin; ++part) {
      for (int64_t i = 0; i < part_row; ++i) totals[i] += p.part_grads[part * part_row + i];
    }
    const int64_t groups = (p.L + kUnitGroup - 1) / kUnitGroup, across = (panels + kPanelGroup - 1) / kPanelGroup;
    const bool branch_needed[] = {need(kVWeight), need(kUWeight)};
    for_each_task(2 * groups * across, [&](int64_t task, int64_t worker) {
      const int64_t branch = task / across / groups;
      if (!branch_needed[branch]) return;
      kernel.weight(p, first, rows, branch, task / across % groups * kUnitGroup, task % across * kPanelGroup,
                    data<T>(branch ? grad_u : grad_v), weight_scratch + worker * kernel.weight_scratch);
    });
  }
  const auto total = [&](Gradient which, const Tensor& to, int64_t row, int64_t count, int64_t from) {
    if (need(which)) std::copy_n(totals.begin() + from, count, data<T>(to) + row * count);
  };
  total(kVBias, grad_v_bias, 0, p.L, 0);
  total(kUBias, grad_u_bias, 0, p.L, p.units);
  for (int64_t k = 0; k < p.K; ++k) total(kWWeight, grad_w, k, p.L, (2 + k) * p.units);
  total(kWBias, grad_w_bias, 0, p.K, (2 + p.K) * p.units);
  return {grad_h, grad_v, grad_v_bias, grad_u, grad_u_bias, grad_w, grad_w_bias};
}

void check(const Instances& in) {
  const ScalarType type = in.h.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16,
      "instances must be float32, float64 or bfloat16");
  STD_TORCH_CHECK(in.h.is_cpu(), "instances must be on the CPU");
  STD_TORCH_CHECK(in.h.dim() == (in.cu_seqlens ? 2 : 3), "instances must be [B, N, D], or [T, D] with cu_seqlens");
  if (in.mask) {
    STD_TORCH_CHECK(
        !in.cu_seqlens && in.mask->is_cpu() && in.mask->scalar_type() == ScalarType::Bool && in.mask->dim() == 2 &&
            in.mask->size(0) == in.h.size(0) && in.mask->size(1) == in.h.size(1),
        "mask must be bool [B, N] on the CPU, of dense bags");
  }
  if (in.cu_seqlens) {
    const ScalarType index = in.cu_seqlens->scalar_type();
    STD_TORCH_CHECK(
        in.cu_seqlens->is_cpu() && in.cu_seqlens->dim() == 1 && in.cu_seqlens->size(0) > 0 &&
            (index == ScalarType::Int || index == ScalarType::Long),
        "cu_seqlens must be int32 or int64 [B + 1] on the CPU");
  }
}

void check(const Inputs& in) {
  check(static_cast<const Instances&>(in));
  const ScalarType type = in.v_weight.scalar_type();
  STD_TORCH_CHECK(
      type == in.h.scalar_type() || (type == ScalarType::Float && in.h.scalar_type() == ScalarType::BFloat16),
      "the weights must have h's dtype, or be float32 beside bfloat16");
  const int64_t D = in.dim(), L = in.v_weight.dim() == 2 ? in.v_weight.size(0) : -1;
  const int64_t K = in.w_weight.dim() == 2 ? in.w_weight.size(0) : -1;
  const auto require = [&](const Optional& x, const char* name, std::vector<int64_t> sizes) {
    if (!x) return;
    bool fits = x->is_cpu() && x->scalar_type() == type && x->dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = x->size(i) == sizes[i];
    STD_TORCH_CHECK(fits, name, " must be on the CPU, of v_weight's dtype, and fit D = ", D, ", L = ", L, ", K = ", K);
  };
  require(in.v_weight, "v_weight", {L, D});
  require(in.v_bias, "v_bias", {L});
  require(in.u_weight, "u_weight", {L, D});
  require(in.u_bias, "u_bias", {L});
  require(in.w_weight, "w_weight", {K, L});
  require(in.w_bias, "w_bias", {K});
  STD_TORCH_CHECK(
      !in.seed || (in.seed->is_cpu() && in.seed->scalar_type() == ScalarType::Long && in.seed->numel() == 1),
      "seed must be int64 [1] on the CPU");
  STD_TORCH_CHECK(in.dropout_p >= 0 && in.dropout_p <= 1, "dropout_p must be from 0 to 1");
  STD_TORCH_CHECK(in.dropout_p == 0 || in.seed, "dropout needs a seed");
}

void check_scores(const Instances& in, const Tensor& scores, int64_t heads) {
  STD_TORCH_CHECK(
      scores.is_cpu() && scores.is_contiguous() && scores.scalar_type() == sums_of(in.h) &&
          scores.dim() == (in.cu_seqlens ? 2 : 3) && scores.size(in.cu_seqlens ? 0 : 1) == heads &&
          scores.size(in.cu_seqlens ? 1 : 2) == in.h.size(in.cu_seqlens ? 0 : 1) &&
          (in.cu_seqlens || scores.size(0) == in.h.size(0)),
      "scores must be contiguous [B, K, N] or [K, T] in the dtype of the sums");
}

void check_grad_pooled(const Instances& in, const Tensor& grad, int64_t heads, ScalarType type) {
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == type && grad.dim() == 3 && grad.size(0) == in.bags() &&
                      grad.size(1) == heads && grad.size(2) == in.dim(),
                  "grad_pooled must have pooled's shape and dtype");
}

Tensor forward(const Inputs& in, const Tensor* pooled) {
  switch (in.h.scalar_type()) {
    case ScalarType::Double: return forward<double, double, double>(in, pooled);
    case ScalarType::Float: return forward<float, float, float>(in, pooled);
    default: break;
  }
  return in.v_weight.scalar_type() == ScalarType::Float ? forward<uint16_t, float, float>(in, pooled)
                                                        : forward<uint16_t, float, uint16_t>(in, pooled);
}

std::tuple<Tensor, Tensor> gated_attention_pool_cpu(
    const Tensor& h, const Tensor& v_weight, const Optional& v_bias, const Optional& u_weight, const Optional& u_bias,
    const Tensor& w_weight, const Optional& w_bias, const Optional& mask, const Optional& cu_seqlens,
    const Optional& seed, double dropout_p, std::string activation) {
  const Inputs in{{h, mask, cu_seqlens}, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, seed, dropout_p,
                  activation};
  check(in);
  const Tensor pooled =
      torch::stable::new_empty(h, {in.bags(), w_weight.size(0), in.dim()}, v_weight.scalar_type());
  const Tensor scores = forward(in, &pooled);
  return {pooled, scores};
}

Tensor attention_scores_cpu(
    const Tensor& h, const Tensor& v_weight, const Optional& v_bias, const Optional& u_weight, const Optional& u_bias,
    const Tensor& w_weight, const Optional& w_bias, const Optional& mask, const Optional& cu_seqlens,
    const Optional& seed, double dropout_p, std::string activation) {
  const Inputs in{{h, mask, cu_seqlens}, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, seed, dropout_p,
                  activation};
  check(in);
  return forward(in, nullptr);
}

Gradients gated_attention_pool_backward_cpu(
    const Optional& grad_pooled, const Optional& grad_scores, const Tensor& h, const Tensor& v_weight,
    const Optional& v_bias, const Optional& u_weight, const Optional& u_bias, const Tensor& w_weight,
    const Optional& w_bias, const Optional& mask, const Optional& cu_seqlens, const Optional& seed, double dropout_p,
    std::string activation, const Tensor& scores, int64_t needs) {
  const Inputs in{{h, mask, cu_seqlens}, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, seed, dropout_p,
                  activation};
  check(in);
  check_scores(in, scores, w_weight.size(0));
  if (grad_pooled) check_grad_pooled(in, *grad_pooled, w_weight.size(0), v_weight.scalar_type());
  STD_TORCH_CHECK(!grad_scores || (grad_scores->is_cpu() && grad_scores->scalar_type() == sums_of(h) &&
                                   grad_scores->dim() == scores.dim() && grad_scores->numel() == scores.numel()),
                  "grad_scores must have scores' shape and dtype");
  switch (h.scalar_type()) {
    case ScalarType::Double: return backward<double, double, double>(grad_pooled, grad_scores, in, scores, needs);
    case ScalarType::Float: return backward<float, float, float>(grad_pooled, grad_scores, in, scores, needs);
    default: break;
  }
  return v_weight.scalar_type() == ScalarType::Float
             ? backward<uint16_t, float, float>(grad_pooled, grad_scores, in, scores, needs)
             : backward<uint16_t, float, uint16_t>(grad_pooled, grad_scores, in, scores, needs);
}

Tensor pool_by_scores_cpu(const Tensor& scores, const Tensor& value, const Optional& mask, const Optional& cu_seqlens) {
  const Instances in{value, mask, cu_seqlens};
  check(in);
  const int64_t heads = scores.size(cu_seqlens ? 0 : 1);
  check_scores(in, scores, heads);
  const Tensor pooled = torch::stable::new_empty(value, {in.bags(), heads, in.dim()});
  switch (value.scalar_type()) {
    case ScalarType::Double: pool<double, double>(in, scores, pooled); break;
    case ScalarType::Float: pool<float, float>(in, scores, pooled); break;
    default: pool<uint16_t, float>(in, scores, pooled);
  }
  return pooled;
}

std::tuple<Tensor, Tensor> pool_by_scores_backward_cpu(const Tensor& grad_pooled, const Tensor& scores,
                                                       const Tensor& value, const Optional& mask,
                                                       const Optional& cu_seqlens, bool need_scores, bool need_value) {
  const Instances in{value, mask, cu_seqlens};
  check(in);
  const int64_t heads = scores.size(cu_seqlens ? 0 : 1);
  check_scores(in, scores, heads);
  check_grad_pooled(in, grad_pooled, heads, value.scalar_type());
  switch (value.scalar_type()) {
    case ScalarType::Double: return pool_backward<double, double>(in, grad_pooled, scores, need_scores, need_value);
    case ScalarType::Float: return pool_backward<float, float>(in, grad_pooled, scores, need_scores, need_value);
    default: return pool_backward<uint16_t, float>(in, grad_pooled, scores, need_scores, need_value);
  }
}

// The weights, and h beside them, in types that have kernels.
struct Converted {
  Tensor h, v_weight;
  Optional v_bias, u_weight, u_bias;
  Tensor w_weight;
  Optional w_bias;

  Converted(const Tensor& h_, const Tensor& v_weight_, const Optional& v_bias_, const Optional& u_weight_,
            const Optional& u_bias_, const Tensor& w_weight_, const Optional& w_bias_)
      : h(h_), v_weight(v_weight_), v_bias(v_bias_), u_weight(u_weight_), u_bias(u_bias_), w_weight(w_weight_),
        w_bias(w_bias_) {
    const ScalarType type = h.scalar_type();
    if (type == v_weight.scalar_type() && type != ScalarType::Half) return;
    const ScalarType sums = type_of_sums(h, v_weight);
    h = accepted(h, sums);
    for (Tensor* x : {&v_weight, &w_weight}) *x = converted(*x, sums);
    for (Optional* x : {&v_bias, &u_weight, &u_bias, &w_bias}) {
      if (*x) *x = converted(**x, sums);
    }
  }
};

// That of pooled.
ScalarType promoted(const Tensor& h, const Tensor& weight) {
  return h.scalar_type() == weight.scalar_type() ? h.scalar_type() : type_of_sums(h, weight);
}

Optional converted_if_there(const Optional& x, ScalarType type) { return x ? Optional(converted(*x, type)) : x; }

std::tuple<Tensor, Tensor> gated_attention_pool(
    const Tensor& h, const Tensor& v_weight, const Optional& v_bias, const Optional& u_weight, const Optional& u_bias,
    const Tensor& w_weight, const Optional& w_bias, const Optional& mask, const Optional& cu_seqlens,
    const Optional& seed, double dropout_p, std::string activation, const std::string& backend) {
  check_backend(backend, "cpu");
  const Converted x(h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias);
  const auto [pooled, scores] = gated_attention_pool_cpu(x.h, x.v_weight, x.v_bias, x.u_weight, x.u_bias, x.w_weight,
                                                         x.w_bias, mask, cu_seqlens, seed, dropout_p, activation);
  return {converted(pooled, promoted(h, v_weight)), scores};
}

Tensor attention_scores(
    const Tensor& h, const Tensor& v_weight, const Optional& v_bias, const Optional& u_weight, const Optional& u_bias,
    const Tensor& w_weight, const Optional& w_bias, const Optional& mask, const Optional& cu_seqlens,
    const Optional& seed, double dropout_p, std::string activation, const std::string& backend) {
  check_backend(backend, "cpu");
  const Converted x(h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias);
  return attention_scores_cpu(x.h, x.v_weight, x.v_bias, x.u_weight, x.u_bias, x.w_weight, x.w_bias, mask, cu_seqlens,
                              seed, dropout_p, activation);
}

Gradients gated_attention_pool_backward(
    const Optional& grad_pooled, const Optional& grad_scores, const Tensor& h, const Tensor& v_weight,
    const Optional& v_bias, const Optional& u_weight, const Optional& u_bias, const Tensor& w_weight,
    const Optional& w_bias, const Optional& mask, const Optional& cu_seqlens, const Optional& seed, double dropout_p,
    std::string activation, const Tensor& scores, std::vector<bool> needs, const std::string& backend) {
  check_backend(backend, "cpu");
  const Converted x(h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias);
  int64_t wanted = 0;
  for (size_t i = 0; i < needs.size(); ++i) wanted |= int64_t{needs[i]} << i;
  const Gradients grads = gated_attention_pool_backward_cpu(
      converted_if_there(grad_pooled, x.v_weight.scalar_type()), converted_if_there(grad_scores, scores.scalar_type()),
      x.h, x.v_weight, x.v_bias, x.u_weight, x.u_bias, x.w_weight, x.w_bias, mask, cu_seqlens, seed, dropout_p,
      activation, torch::stable::contiguous(scores), wanted);
  const auto as = [](const Tensor& grad, const Optional& of) { return of ? converted(grad, of->scalar_type()) : grad; };
  return {as(std::get<0>(grads), h),        as(std::get<1>(grads), v_weight), as(std::get<2>(grads), v_bias),
          as(std::get<3>(grads), u_weight), as(std::get<4>(grads), u_bias),   as(std::get<5>(grads), w_weight),
          as(std::get<6>(grads), w_bias)};
}

Tensor pool_by_scores(const Tensor& scores, const Tensor& value, const Optional& mask, const Optional& cu_seqlens,
                      const std::string& backend) {
  check_backend(backend, "cpu");
  const ScalarType sums = type_of_sums(scores, value);
  const Tensor wide = torch::stable::contiguous(converted(scores, sums));
  return converted(pool_by_scores_cpu(wide, accepted(value, sums), mask, cu_seqlens), value.scalar_type());
}

std::tuple<Tensor, Tensor> pool_by_scores_backward(
    const Tensor& grad_pooled, const Tensor& scores, const Tensor& value, const Optional& mask,
    const Optional& cu_seqlens, std::vector<bool> needs, const std::string& backend) {
  check_backend(backend, "cpu");
  STD_TORCH_CHECK(needs.size() == 2, "needs must have two elements");
  const ScalarType sums = type_of_sums(scores, value);
  const Tensor v = accepted(value, sums);
  const auto [grad_scores, grad_value] = pool_by_scores_backward_cpu(
      converted(grad_pooled, v.scalar_type()), torch::stable::contiguous(converted(scores, sums)), v, mask, cu_seqlens,
      needs[0], needs[1]);
  return {converted(grad_scores, scores.scalar_type()), converted(grad_value, value.scalar_type())};
}

}  // namespace
}  // namespace ercn

STABLE_TORCH_LIBRARY_IMPL(ercn, CPU, m) {
  m.impl("gated_attention_pool", TORCH_BOX(&ercn::gated_attention_pool));
  m.impl("gated_attention_pool_backward", TORCH_BOX(&ercn::gated_attention_pool_backward));
  m.impl("attention_scores", TORCH_BOX(&ercn::attention_scores));
  m.impl("pool_by_scores", TORCH_BOX(&ercn::pool_by_scores));
  m.impl("pool_by_scores_backward", TORCH_BOX(&ercn::pool_by_scores_backward));
}
