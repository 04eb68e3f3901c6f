#pragma once
// What the attention pooling kernels of all instruction sets share: what each step reads and writes, and their entry
// points. h holds E (float, double, or bfloat16 as uint16_t), the weights and pooled hold W (E, or T), sums are T.
#include <cstdint>

namespace ercn {

constexpr int64_t kMaxBlockRows = 96;  // instances of a block: their scores, softmax and gradients are formed together
constexpr int64_t kSlice = 128;  // instances of one term of a weight gradient's sum
constexpr int64_t kUnitGroup = 256;  // hidden units times
constexpr int64_t kStripGroup = 4;  // strips of channels: the part of a weight gradient that is summed in cache
constexpr int64_t kDpUnits = 8;  // hidden units of dp side by side
constexpr int64_t kDropUnits = 64;  // hidden units whose random bits are drawn together: four words of 16 counters

// Row r, column c at at[r * row + c * col].
template <typename E>
struct Matrix {
  const E* at;
  int64_t row, col;
};

// A run of one bag's instances within a block.
struct Segment {
  int64_t first, rows, bag;
};

// Instances [first, first + rows) in the segments [begin, end): what one task handles.
struct InstanceBlock {
  int64_t first, rows, begin, end;
};

// Instances are numbered over all bags. Instance i lies at h[i / N * stride_b + i % N * stride_n]. `real`, if not null,
// lists those that the mask keeps; segments and all other arrays of instances then count places in that list, and
// masked instances are never read.
template <typename E>
struct Instances {
  const E* h;
  int64_t D, N, stride_b, stride_n, stride_d;
  const int64_t* real;
  int64_t bags, K;  // K heads
  const Segment* segments;
};

enum class Activation { tanh, relu, gelu };

// A unit is dropped where its 16 random bits are below the threshold; the others are scaled. Unit l of instance i takes
// word (l / 16) % 4 of Philox's counter (i, i >> 32, l / 64 * 16 + l % 16, 0), V its low 16 bits and U its high ones.
struct Dropout {
  uint64_t keys[10][2];  // of every round, words in 64 bits
  int32_t threshold;
  double scale;
};

// V, U and w as they are given, and packed. A panel of projections has two vectors of hidden units: V's and U's of the
// same units, or V's.
template <typename T, typename W>
struct HiddenLayer {
  int64_t D, L, K;
  int64_t branches;  // 2, or 1 without U
  int64_t units;  // L rounded up to whole panels; what pads it is 0
  Activation activation;
  const Dropout* dropout;  // or null
  Matrix<W> v, u;  // [L, D]

  void* projections;  // [units · branches / (2 · lanes), D rounded up to even, 2, lanes]
  T* strips;  // backward: [D rounded up / strip, branches · units, strip]
  T* biases;  // [units · branches / (2 · lanes), 2, lanes]
  T *w, *w_bias;  // [K, units], [K]
};

// Of every segment and head, with e = exp(s - max).
template <typename T>
struct SoftmaxParts {
  T *max, *sum;  // [segments, K]
  T* pooled;  // Σ e h [segments, K, D]; null where only scores or gradients are formed
};

// The backward of pooled = Σ a h: ds = a (ĝ·h - Σ a (ĝ·h)).
template <typename T>
struct SoftmaxGradient {
  T* grad_pooled;  // ĝ [bags, K, D rounded up to strips], or null: there is none
  SoftmaxParts<T> parts;
  T *part_dot, *scale;  // Σ e (ĝ·h), and what makes e to a: [segments, K]
  T* bag_dot;  // Σ a (ĝ·h) [bags, K]
  T* dots;  // ĝ·h [instances, K], or null where ds is not wanted
  // e, then a, [instances, K]. The same numbers make bag_dot and the gradients, so that their errors cancel as the
  // gradients do.
  T* attention;
};

// The gradient of scores that is given, with the strides of a bag, a head and an instance; or null.
template <typename T>
struct ScoreGradient {
  const T* at;
  int64_t bag, head, instance;
};

// The backward of the hidden layer, a chunk of blocks at a time. dp is the gradient of the projections: of V's units,
// then of U's.
template <typename E, typename T>
struct HiddenGradient {
  int64_t first;  // instance of the chunk
  T* dp;  // [branches · units / 8, instances of a chunk, 8], dp_stride apart
  int64_t dp_stride;
  T* parts;  // of each block of the chunk: [2 + K, units] of v_bias, u_bias, w, then [K] of w_bias
  E* grad_h;  // [B, N, D] contiguous, or null
};

// The part of a weight gradient to which one task adds a chunk: rows [unit, unit + kUnitGroup) of V's (branch 0) or of
// U's, kStripGroup strips of columns.
struct WeightTile {
  int64_t branch, unit, strip;
};

template <typename E, typename T, typename W>
struct PoolKernel {
  int64_t lanes;  // of a vector
  int64_t strip;  // channels
  int64_t operand_bytes;  // of an element of h and of the weights in the projections

  void (*pack_panel)(const HiddenLayer<T, W>& layer, int64_t panel);
  void (*pack_strip)(const HiddenLayer<T, W>& layer, int64_t strip);
  int64_t (*block_scratch)(int64_t D, int64_t K, bool dropout);  // bytes of `scratch` below
  // Scores of a block, and its parts unless parts.pooled is null.
  void (*forward)(
      const Instances<E>& instances, const HiddenLayer<T, W>& layer, const InstanceBlock& block, T* scores,
      const SoftmaxParts<T>& parts, void* scratch);
  // Parts of a block from scores that are there already.
  void (*pool)(
      const Instances<E>& instances, const InstanceBlock& block, const T* scores, const SoftmaxParts<T>& parts,
      void* scratch);
  // softmax.attention and dots, and the parts of max, sum and dot, from scores.
  void (*dots)(
      const Instances<E>& instances, const InstanceBlock& block, const T* scores, const SoftmaxGradient<T>& softmax,
      void* scratch);
  // dp, grad_h and parts[`part`] of a block.
  void (*backward)(
      const Instances<E>& instances, const HiddenLayer<T, W>& layer, const InstanceBlock& block,
      const SoftmaxGradient<T>& softmax, const ScoreGradient<T>& grad_scores, const HiddenGradient<E, T>& gradient,
      int64_t part, void* scratch);
  // The gradients of pool_by_scores, after dots: grad_h = aᵀ ĝ, and grad_scores in the layout of scores, or null.
  void (*pool_backward)(
      const Instances<E>& instances, const InstanceBlock& block, const SoftmaxGradient<T>& softmax, T* grad_scores,
      E* grad_h);
  // grad[l, d] += Σ_i dp[i, l] h[i, d] over the chunk's `rows` instances. scratch: weight_scratch elements of T.
  int64_t weight_scratch;
  void (*add_weight)(
      const Instances<E>& instances, const HiddenLayer<T, W>& layer, const HiddenGradient<E, T>& gradient, int64_t rows,
      const WeightTile& tile, T* grad, T* scratch);
};

}  // namespace ercn
