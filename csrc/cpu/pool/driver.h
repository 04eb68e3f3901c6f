#pragma once
// The steps of the pool's operators: their tasks and their memory.
//
// The instances of all bags are numbered in one row, which is cut into blocks across bags; segments are the bags'
// shares of blocks. Blocks, chunks and the order of every sum depend only on the shapes and the mask, so results do not
// depend on threads. Extra memory, T instances: forward, packed weights and T · K · D / 64 for the segments' shares of
// z; backward, weights packed twice, dp of one chunk (4 MiB, at least one block) and 2 · T · K of attention and dots.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>

#include "../kernels.h"
#include "../tasks.h"
#include "inputs.h"

namespace ercn {

constexpr int64_t kDpBytes = 4 << 20;  // dp of a chunk: with its rows of h it stays in the last level of cache

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename E>
Matrix<E> matrix(const Tensor& x) {
  return {static_cast<const E*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

// ---- bags, blocks and segments ----

// The list of real instances, and the bags' ends in it.
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

inline Bags bags_of(const BagInputs& in) {
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

// Instances of K heads in blocks of equal size, and their segments.
template <typename E>
struct Problem {
  const Bags bags;
  int64_t block_rows;
  std::vector<InstanceBlock> blocks;
  std::vector<Segment> segments;
  std::vector<int64_t> first_segment;  // of each bag, and one past the last
  Instances<E> instances;

  Problem(const BagInputs& in, int64_t heads) : bags(bags_of(in)) {
    block_rows = std::clamp(round_up((bags.total + 15) / 16, 8), int64_t{8}, kMaxBlockRows);
    int64_t begin = 0;
    for (size_t bag = 0; bag < bags.ends.size(); ++bag) {
      first_segment.push_back(segments.size());
      while (begin < bags.ends[bag]) {
        const int64_t end = std::min(bags.ends[bag], begin / block_rows * block_rows + block_rows);
        if (begin % block_rows == 0) blocks.push_back({begin, 0, int64_t(segments.size()), 0});
        segments.push_back({begin, end - begin, static_cast<int64_t>(bag)});
        blocks.back().rows = end - blocks.back().first;
        blocks.back().end = segments.size();
        begin = end;
      }
    }
    first_segment.push_back(segments.size());

    const bool ragged = in.cu_seqlens.has_value();
    const int64_t N = in.h.size(ragged ? 0 : 1), stride_n = in.h.stride(ragged ? 0 : 1);
    instances = {
        .h = static_cast<const E*>(in.h.const_data_ptr()),
        .D = in.dim(),
        .N = N,
        .stride_b = ragged || in.h.size(0) == 1 ? N * stride_n : in.h.stride(0),
        .stride_n = stride_n,
        .stride_d = in.h.stride(ragged ? 1 : 2),
        .real = in.mask ? bags.real.data() : nullptr,
        .bags = static_cast<int64_t>(bags.ends.size()),
        .K = heads,
        .segments = segments.data()};
  }
  Problem(const Problem&) = delete;

  int64_t parts() const { return segments.size() * instances.K; }
  // Runs body(block, scratch of its worker) for every block.
  template <typename F>
  void for_each_block(const WorkerScratch<char>& scratch, const F& body) const {
    for_each_task(blocks.size(), [&](int64_t b, int64_t worker) { body(blocks[b], scratch.of(worker)); });
  }
};

// ---- the hidden layer ----

// The threshold rounds half to even, as Python's round does.
inline std::optional<Dropout> dropout_of(const PoolInputs& in) {
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

inline Activation activation_of(const std::string& name) {
  if (name == "tanh") return Activation::tanh;
  if (name == "relu") return Activation::relu;
  STD_TORCH_CHECK(name == "gelu", "activation must be tanh, relu or gelu");
  return Activation::gelu;
}

// The layer and its packed weights, pieces of a workspace; `strips`: also those for grad_h.
template <typename E, typename T, typename W>
class Layer : public HiddenLayer<T, W> {
 public:
  Layer(const PoolKernel<E, T, W>& kernel, const PoolInputs& in, Workspace& workspace, bool strips)
      : kernel_(kernel), dropout_(dropout_of(in)) {
    this->D = in.bags().dim(), this->L = in.v_weight.size(0), this->K = in.heads();
    this->branches = in.u_weight ? 2 : 1;
    this->units = round_up(this->L, std::max<int64_t>(2 / this->branches * kernel.lanes, 8));
    this->activation = activation_of(in.activation);
    this->dropout = dropout_ ? &*dropout_ : nullptr;
    this->v = matrix<W>(in.v_weight);
    this->u = in.u_weight ? matrix<W>(*in.u_weight) : this->v;
    const int64_t rows = this->branches * this->units;
    panels_ = rows / (2 * kernel.lanes), strips_ = strips ? (this->D + kernel.strip - 1) / kernel.strip : 0;
    workspace.reserve(reinterpret_cast<char*&>(this->projections), rows * round_up(this->D, 2) * kernel.operand_bytes);
    workspace.reserve(this->strips, strips_ * kernel.strip * rows);
    workspace.reserve(this->biases, rows);
    workspace.reserve(this->w, this->K * this->units);
    workspace.reserve(this->w_bias, this->K);
  }
  Layer(const Layer&) = delete;

  void pack(const PoolInputs& in) const {
    pack_small(in);
    for_each_task(panels_ + strips_, [&](int64_t task, int64_t) {
      if (task < panels_) {
        kernel_.pack_panel(*this, task);
      } else {
        kernel_.pack_strip(*this, task - panels_);
      }
    });
  }

 private:
  // The biases and w.
  void pack_small(const PoolInputs& in) const {
    const int64_t lanes = kernel_.lanes, units = this->units;
    const auto bias = [](const Optional& source, int64_t i, int64_t count) {
      if (!source || i >= count) return T(0);
      return convert<T>(static_cast<const W*>(source->const_data_ptr())[i * source->stride(0)]);
    };
    for (int64_t l = 0; l < units; ++l) {
      T* to = this->branches == 1 ? this->biases + l : this->biases + l / lanes * 2 * lanes + l % lanes;
      to[0] = bias(in.v_bias, l, this->L);
      if (this->branches == 2) to[lanes] = bias(in.u_bias, l, this->L);
    }
    const Matrix<W> w = matrix<W>(in.w_weight);
    for (int64_t k = 0; k < this->K; ++k) {
      for (int64_t l = 0; l < units; ++l) {
        this->w[k * units + l] = l < this->L ? convert<T>(w.at[k * w.row + l * w.col]) : T(0);
      }
      this->w_bias[k] = bias(in.w_bias, k, this->K);
    }
  }

  const PoolKernel<E, T, W>& kernel_;
  const std::optional<Dropout> dropout_;
  int64_t panels_, strips_;
};

// ---- the softmax over a bag from its segments' parts ----

// Calls add(segment, exp(its max - bag's max)) in order, and gives the bag's sum.
template <typename E, typename T, typename F>
double join(const Problem<E>& problem, const SoftmaxParts<T>& parts, int64_t bag, int64_t k, const F& add) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const int64_t K = problem.instances.K, begin = problem.first_segment[bag], end = problem.first_segment[bag + 1];
  T most = -infinity;
  for (int64_t s = begin; s < end; ++s) most = std::max(most, parts.max[s * K + k]);
  if (most == -infinity) most = 0;
  double sum = 0;
  for (int64_t s = begin; s < end; ++s) {
    const T own = parts.max[s * K + k];
    // A part whose scores are all -Inf holds zeros, or NaN.
    const double scale = own == -infinity ? 1 : std::exp(static_cast<double>(own) - most);
    sum += scale * parts.sum[s * K + k];
    add(s, scale);
  }
  return sum;
}

template <typename E, typename T>
void reserve_parts(Workspace& workspace, const Problem<E>& problem, SoftmaxParts<T>& parts, bool pooled) {
  workspace.reserve(parts.max, problem.parts());
  workspace.reserve(parts.sum, problem.parts());
  if (pooled) workspace.reserve(parts.pooled, problem.parts() * problem.instances.D);
}

// pooled from the segments' parts.
template <typename W, typename E, typename T>
void join_parts(const Problem<E>& problem, const SoftmaxParts<T>& parts, W* out) {
  constexpr int64_t width = 256;
  const int64_t D = problem.instances.D, K = problem.instances.K, bags = problem.instances.bags;
  const int64_t blocks = (D + width - 1) / width;
  // Joining one block takes about `width` additions for every segment of its bag.
  const int64_t grain = 1 + (int64_t{1} << 17) * std::max<int64_t>(bags, 1) / (width * (problem.segments.size() + 1));
  for_each_task(
      bags * K * blocks,
      [&](int64_t task, int64_t) {
        const int64_t row = task / blocks, bag = row / K, k = row % K, d0 = task % blocks * width;
        const int64_t columns = std::min(width, D - d0);
        double z[width] = {};
        const double sum = join(problem, parts, bag, k, [&](int64_t s, double scale) {
          const T* part = parts.pooled + (s * K + k) * D + d0;
          for (int64_t d = 0; d < columns; ++d) z[d] += scale * part[d];
        });
        const bool empty = problem.first_segment[bag] == problem.first_segment[bag + 1];
        for (int64_t d = 0; d < columns; ++d) {
          out[row * D + d0 + d] = convert<W>(static_cast<T>(empty ? 0 : z[d] / sum));
        }
      },
      grain);
}

template <typename E, typename T>
void reserve_softmax(
    Workspace& workspace, const Problem<E>& problem, int64_t columns, bool dots, SoftmaxGradient<T>& softmax) {
  const int64_t rows = problem.instances.bags * problem.instances.K, scores = problem.bags.total * problem.instances.K;
  workspace.reserve(softmax.grad_pooled, rows * columns);
  reserve_parts(workspace, problem, softmax.parts, false);
  workspace.reserve(softmax.part_dot, problem.parts());
  workspace.reserve(softmax.scale, problem.parts());
  workspace.reserve(softmax.bag_dot, rows);
  if (dots) workspace.reserve(softmax.dots, scores);
  workspace.reserve(softmax.attention, scores);
}

// Forms all of softmax; attention is still e.
template <typename E, typename T, typename W>
void form_softmax(
    const PoolKernel<E, T, W>& kernel, const Problem<E>& problem, const Tensor& grad_pooled, const Tensor& scores,
    int64_t columns, const SoftmaxGradient<T>& softmax, const WorkerScratch<char>& scratch) {
  const int64_t D = problem.instances.D, K = problem.instances.K, bags = problem.instances.bags;
  const W* from = static_cast<const W*>(grad_pooled.const_data_ptr());
  const int64_t stride_b = grad_pooled.stride(0), stride_k = grad_pooled.stride(1), stride_d = grad_pooled.stride(2);
  for (int64_t row = 0; row < bags * K; ++row) {
    for (int64_t d = 0; d < columns; ++d) {
      softmax.grad_pooled[row * columns + d] =
          d < D ? convert<T>(from[row / K * stride_b + row % K * stride_k + d * stride_d]) : T(0);
    }
  }
  problem.for_each_block(scratch, [&](const InstanceBlock& block, char* memory) {
    kernel.dots(problem.instances, block, static_cast<const T*>(scores.const_data_ptr()), softmax, memory);
  });
  for (int64_t row = 0; row < bags * K; ++row) {
    const int64_t bag = row / K, k = row % K;
    double dot = 0;
    const double sum = join(problem, softmax.parts, bag, k, [&](int64_t s, double own) {
      dot += own * softmax.part_dot[s * K + k];
      softmax.scale[s * K + k] = static_cast<T>(own);
    });
    for (int64_t s = problem.first_segment[bag]; s < problem.first_segment[bag + 1]; ++s) {
      softmax.scale[s * K + k] /= sum;
    }
    softmax.bag_dot[row] = static_cast<T>(dot / sum);
  }
}

// ---- the operators ----

// Returns the scores, and writes z to `pooled` unless that is null.
template <typename E, typename T, typename W>
Tensor forward(const PoolKernel<E, T, W>& kernel, const PoolInputs& in, const Tensor* pooled) {
  const Problem<E> problem(in.bags(), in.heads());
  const Tensor scores = in.bags().empty_scores(in.heads());
  if (in.mask) torch::stable::fill_(scores, -std::numeric_limits<double>::infinity());
  Workspace workspace;
  Layer<E, T, W> layer(kernel, in, workspace, false);
  SoftmaxParts<T> parts{};
  if (pooled) reserve_parts(workspace, problem, parts, true);
  WorkerScratch<char> scratch;
  workspace.reserve(scratch, kernel.block_scratch(layer.D, layer.K, layer.dropout));
  workspace.allocate(in.h);
  if (!problem.blocks.empty()) layer.pack(in);
  problem.for_each_block(scratch, [&](const InstanceBlock& block, char* memory) {
    kernel.forward(problem.instances, layer, block, data<T>(scores), parts, memory);
  });
  if (pooled) join_parts(problem, parts, data<W>(*pooled));
  return scores;
}

template <typename E, typename T, typename W>
void pool(const PoolKernel<E, T, W>& kernel, const BagInputs& in, const Tensor& scores, const Tensor& pooled) {
  const Problem<E> problem(in, pooled.size(1));
  Workspace workspace;
  SoftmaxParts<T> parts{};
  reserve_parts(workspace, problem, parts, true);
  WorkerScratch<char> scratch;
  workspace.reserve(scratch, kernel.block_scratch(in.dim(), pooled.size(1), false));
  workspace.allocate(in.h);
  problem.for_each_block(scratch, [&](const InstanceBlock& block, char* memory) {
    kernel.pool(problem.instances, block, static_cast<const T*>(scores.const_data_ptr()), parts, memory);
  });
  join_parts(problem, parts, data<W>(pooled));
}

template <typename E, typename T, typename W>
std::tuple<Tensor, Tensor> pool_backward(
    const PoolKernel<E, T, W>& kernel, const BagInputs& in, const Tensor& grad_pooled, const Tensor& scores,
    bool need_scores, bool need_value) {
  const Problem<E> problem(in, grad_pooled.size(1));
  const Tensor grad_scores =
      need_scores ? in.empty_scores(problem.instances.K) : torch::stable::new_empty(in.h, {0}, sums_of(in.h));
  const Tensor grad_value = need_value ? in.empty_h() : torch::stable::new_empty(in.h, {0});
  if (in.mask) torch::stable::fill_(grad_scores, 0), torch::stable::fill_(grad_value, 0);
  const int64_t columns = round_up(in.dim(), kernel.strip);
  Workspace workspace;
  SoftmaxGradient<T> softmax{};
  reserve_softmax(workspace, problem, columns, need_scores, softmax);
  WorkerScratch<char> scratch;
  workspace.reserve(scratch, kernel.block_scratch(in.dim(), problem.instances.K, false));
  workspace.allocate(in.h);
  form_softmax(kernel, problem, grad_pooled, scores, columns, softmax, scratch);
  problem.for_each_block(scratch, [&](const InstanceBlock& block, char*) {
    kernel.pool_backward(
        problem.instances, block, softmax, need_scores ? data<T>(grad_scores) : nullptr,
        need_value ? data<E>(grad_value) : nullptr);
  });
  return {grad_scores, grad_value};
}

// The gradients that are asked for; the others are empty.
template <typename T>
class Outputs {
 public:
  Outputs(const PoolInputs& in, const std::vector<bool>& needs) {
    const bool given[] = {
        true, true, in.v_bias.has_value(), in.u_weight.has_value(), in.u_bias.has_value(), true, in.w_bias.has_value()};
    const int64_t D = in.bags().dim(), L = in.v_weight.size(0), K = in.heads();
    const std::vector<int64_t> sizes[] = {{}, {L, D}, {L}, {L, D}, {L}, {K, L}, {K}};
    for (int i = kH; i <= kWBias; ++i) {
      needed_[i] = given[i] && i < static_cast<int64_t>(needs.size()) && needs[i];
      if (!needed_[i]) {
        grads_.push_back(torch::stable::new_empty(in.h, {0}));
      } else if (i == kH) {
        grads_.push_back(in.bags().empty_h());
        if (in.mask || in.cu_seqlens) torch::stable::fill_(grads_[i], 0);  // no instance, no gradient
      } else {
        grads_.push_back(torch::stable::fill_(torch::stable::new_empty(in.h, sizes[i], sums_of(in.h)), 0));
      }
    }
  }

  bool needed(Gradient which) const { return needed_[which]; }
  template <typename E = T>
  E* at(Gradient which) const {
    return needed_[which] ? data<E>(grads_[which]) : nullptr;
  }
  // Row `row` of a weight or a bias.
  void write(Gradient which, const double* from, int64_t count, int64_t row = 0) const {
    if (needed_[which]) std::copy_n(from, count, at(which) + row * count);
  }
  Gradients tensors() const { return {grads_[0], grads_[1], grads_[2], grads_[3], grads_[4], grads_[5], grads_[6]}; }

 private:
  bool needed_[kWBias + 1];
  std::vector<Tensor> grads_;
};

// Adds a chunk of `rows` instances to the gradients of V and U.
template <typename E, typename T, typename W>
void add_weights(
    const PoolKernel<E, T, W>& kernel, const Problem<E>& problem, const HiddenLayer<T, W>& layer,
    const HiddenGradient<E, T>& gradient, int64_t rows, const Outputs<T>& outputs, const WorkerScratch<T>& scratch) {
  const int64_t groups = (layer.L + kUnitGroup - 1) / kUnitGroup;
  const int64_t across = (round_up(layer.D, kernel.strip) / kernel.strip + kStripGroup - 1) / kStripGroup;
  for_each_task(2 * groups * across, [&](int64_t task, int64_t worker) {
    const int64_t branch = task / across / groups;
    T* const grad = outputs.at(branch ? kUWeight : kVWeight);
    if (!grad) return;
    const WeightTile tile{branch, task / across % groups * kUnitGroup, task % across * kStripGroup};
    kernel.add_weight(problem.instances, layer, gradient, rows, tile, grad, scratch.of(worker));
  });
}

template <typename E, typename T, typename W>
Gradients backward(
    const PoolKernel<E, T, W>& kernel, const PoolInputs& in, const Optional& grad_pooled, const Optional& grad_scores,
    const Tensor& scores, const std::vector<bool>& needs) {
  const Problem<E> problem(in.bags(), in.heads());
  const Outputs<T> outputs(in, needs);
  Workspace workspace;
  Layer<E, T, W> layer(kernel, in, workspace, outputs.needed(kH));
  const int64_t L = layer.L, K = layer.K, units = layer.units, columns = round_up(layer.D, kernel.strip);
  const int64_t dp_columns = layer.branches * units, part = (2 + K) * units + K, count = problem.blocks.size();
  const int64_t block_bytes = dp_columns * problem.block_rows * sizeof(T);
  const int64_t chunk =  // blocks
      std::max<int64_t>(1, std::min<int64_t>(count, kDpBytes / std::max<int64_t>(1, block_bytes)));

  SoftmaxGradient<T> softmax{};
  HiddenGradient<E, T> gradient{};
  WorkerScratch<char> scratch;
  WorkerScratch<T> weight_scratch;
  if (grad_pooled) reserve_softmax(workspace, problem, columns, true, softmax);
  gradient.dp_stride = chunk * problem.block_rows * kDpUnits + 16;  // a power of two would crowd the cache
  gradient.grad_h = outputs.template at<E>(kH);
  workspace.reserve(gradient.dp, dp_columns / kDpUnits * gradient.dp_stride);
  workspace.reserve(gradient.parts, chunk * part);
  workspace.reserve(scratch, kernel.block_scratch(layer.D, K, layer.dropout));
  workspace.reserve(weight_scratch, kernel.weight_scratch);
  workspace.allocate(in.h);

  ScoreGradient<T> score_gradient{};
  if (grad_scores) {
    const bool ragged = in.cu_seqlens.has_value();
    score_gradient = {
        .at = static_cast<const T*>(grad_scores->const_data_ptr()),
        .bag = ragged ? 0 : grad_scores->stride(0),
        .head = grad_scores->stride(ragged ? 0 : 1),
        .instance = grad_scores->stride(ragged ? 1 : 2)};
  }
  if (count > 0) layer.pack(in);
  if (grad_pooled) form_softmax(kernel, problem, *grad_pooled, scores, columns, softmax, scratch);

  // Terms of either sign over all instances: sums are double, since what remains after they cancel is small.
  std::vector<double> totals(part);
  for (int64_t begin = 0; begin < count; begin += chunk) {
    const int64_t blocks = std::min(chunk, count - begin);
    const InstanceBlock& last = problem.blocks[begin + blocks - 1];
    gradient.first = problem.blocks[begin].first;
    for_each_task(blocks, [&](int64_t task, int64_t worker) {
      kernel.backward(
          problem.instances, layer, problem.blocks[begin + task], softmax, score_gradient, gradient, task,
          scratch.of(worker));
    });
    for (int64_t task = 0; task < blocks; ++task) {
      for (int64_t i = 0; i < part; ++i) totals[i] += gradient.parts[task * part + i];
    }
    add_weights(kernel, problem, layer, gradient, last.first + last.rows - gradient.first, outputs, weight_scratch);
  }
  outputs.write(kVBias, totals.data(), L);
  outputs.write(kUBias, totals.data() + units, L);
  for (int64_t k = 0; k < K; ++k) outputs.write(kWWeight, totals.data() + (2 + k) * units, L, k);
  outputs.write(kWBias, totals.data() + (2 + K) * units, K);
  return outputs.tensors();
}

}  // namespace ercn
