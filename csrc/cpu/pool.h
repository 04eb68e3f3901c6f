#pragma once
// What the attention pooling kernels of all instruction sets share: one call's operands, and their entry points.
#include <cstdint>

namespace ercn {

constexpr int64_t kMaxChunk = 96;    // instances whose scores, softmax and gradients are formed together
constexpr int64_t kSlice = 128;      // instances of one term of a weight gradient's sum
constexpr int64_t kUnitGroup = 256;  // hidden units times
constexpr int64_t kDpUnits = 8;      // hidden units of dp side by side
constexpr int64_t kPanelGroup = 4;   // panels of channels: the block of a weight gradient that is summed in cache
constexpr int64_t kDropUnits = 64;   // hidden units whose random bits are drawn together: four words of 16 counters

enum class Activation { tanh, relu, gelu };

// A unit is dropped where its 16 random bits are below the threshold; the others are scaled. Unit l of instance i takes
// word (l / 16) % 4 of Philox's counter (i, i >> 32, l / 64 * 16 + l % 16, 0), V its low 16 bits and U its high ones.
struct Dropout {
  uint64_t keys[10][2];  // of every round, words in 64 bits
  int32_t threshold;
  double scale;
};

// Row r, column c at at[r * row + c * col].
template <typename E>
struct Matrix {
  const E* at;
  int64_t row, col;
};

// Instances of one bag within one chunk.
struct Segment {
  int64_t first, rows, bag;
};

// One call. h holds E (float, double, or bfloat16 as uint16_t), the weights and pooled W (E, or T), sums are T.
// Instances are numbered over all bags; `real`, if not null, lists those that the mask keeps, and all else speaks of
// places in that list: masked ones are never read. Instance i lies at h[i / N * stride_b + i % N * stride_n]; its score
// at scores[i / N * K * N + k * N + i % N].
template <typename E, typename T, typename W>
struct Pool {
  const E* h;
  int64_t N, stride_b, stride_n, stride_d;
  const int64_t* real;
  int64_t D, L, K, bags;
  int64_t branches;  // 2, or 1 without U
  int64_t units;     // L rounded up to whole panels; what pads it is 0
  Matrix<W> v, u;    // [L, D]
  Activation activation;
  const Dropout* dropout;  // or null

  // Packed by the kernel. A panel of projections has two vectors of hidden units: V's and U's of the same units, or
  // V's.
  void* projections;  // [units · branches / (2 · lanes), D rounded up to even, 2, lanes]
  T* columns;         // backward: [D rounded up / panel, branches · units, panel]
  T* biases;          // [units · branches / (2 · lanes), 2, lanes]
  T *w, *w_bias;      // [K, units], [K]

  T* scores;
  const Segment* segments;
  // Per segment and head; in the backward part_dot is Σ e (ĝ·h).
  T *part_max, *part_sum, *part_dot;  // [segments, K]
  T* part_pooled;                     // [segments, K, D], or null: scores alone

  // Backward. The gradient of the projections, dp, is of V's units, then of U's.
  const T* grad_pooled;  // [bags, K, D rounded up to panels], or null
  const T* grad_scores;  // with the strides of a bag, a head, an instance; or null
  int64_t grad_scores_b, grad_scores_k, grad_scores_n;
  T* dots;                     // [instances, K], ĝ·h, or null where they are not wanted
  // [instances, K]: exp(s − the segment's max), then times part_scale. The same numbers make bag_dot and the gradients,
  // so that their errors cancel as the gradients do.
  T* attention;
  const T *part_scale, *bag_dot;  // [segments, K], [bags, K]
  T* dp;                                  // [branches · units / 8, instances of a superblock, 8], dp_block apart
  int64_t dp_block;
  T* part_grads;  // per chunk of a superblock: [2 + K, units] of v_bias, u_bias, w, then [K] of w_bias
  E* grad_h;      // [B, N, D] contiguous, or null
  T* scores_grad;  // of pool_by_scores, laid out as scores, or null
};

template <typename E, typename T, typename W>
struct PoolKernel {
  int64_t lanes;           // of a vector
  int64_t panel;           // channels of a panel of columns
  int64_t operand_bytes;   // of an element of h and of the weights in the projections

  void (*pack_projection)(const Pool<E, T, W>& pool, int64_t panel);
  void (*pack_columns)(const Pool<E, T, W>& pool, int64_t panel);
  int64_t (*chunk_scratch)(const Pool<E, T, W>& pool);  // bytes, for those below
  // Scores, and the parts of max, sum and pooled, of the segments [begin, end) of one chunk.
  void (*forward)(const Pool<E, T, W>& pool, int64_t begin, int64_t end, void* scratch);
  // The same from scores that are there already: parts alone.
  void (*pool)(const Pool<E, T, W>& pool, int64_t begin, int64_t end, void* scratch);
  // dots, and the parts of max, sum and dot.
  void (*dots)(const Pool<E, T, W>& pool, int64_t begin, int64_t end, void* scratch);
  // dp of a superblock that begins at instance dp_first, part_grads number `part`, and grad_h.
  void (*backward)(const Pool<E, T, W>& pool, int64_t begin, int64_t end, int64_t dp_first, int64_t part,
                   void* scratch);
  // Of pool_by_scores, after dots: grad_h = aᵀ ĝ, and scores_grad.
  void (*pool_backward)(const Pool<E, T, W>& pool, int64_t begin, int64_t end);
  // grad[l, d] += Σ_i dp[i - first, unit + l] h[i, d] over the superblock's `rows` instances, hidden units [unit, unit
  // + kUnitGroup) of a branch and kPanelGroup panels of channels. scratch: weight_scratch elements of T.
  int64_t weight_scratch;
  void (*weight)(const Pool<E, T, W>& pool, int64_t first, int64_t rows, int64_t branch, int64_t unit, int64_t panel,
                 T* grad, T* scratch);
};

}  // namespace ercn
