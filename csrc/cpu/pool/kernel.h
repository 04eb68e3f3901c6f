#pragma once
// Gated attention pooling for one instruction set (see pool.h and simd.h).
#include "projection.h"

namespace ercn::ERCN_ISA {

// ---- forward ----

// s[m, k] = w_k · gate(m) + b_k for every instance of the block.
template <bool GATED, typename E, typename T, typename W, typename X>
ERCN_INLINE void score_block(
    const Instances<E>& in, const HiddenLayer<T, W>& layer, const InstanceBlock& block, Matrix<X> x,
    const BlockScratch<X, T>& scratch, T* scores) {
  constexpr int64_t n = kLanes<T>, units = GATED ? n : 2 * n;
  const int64_t depth = operand_depth<X>(in.D), K = in.K;
  T* head_sums = scratch.head_sums;
  for (int64_t i = 0; i < block.rows * K; ++i) store(head_sums + i * n, Vec<T>{});
  for (int64_t panel = 0; panel < layer.units / units; ++panel) {
    const int64_t first = panel * units;
    const bool partial = first + units > layer.L;
    if (layer.dropout && first % kDropUnits == 0) {
      draw(in, *layer.dropout, block.first, block.rows, first, scratch.words);
    }
    const X* weights = static_cast<const X*>(layer.projections) + panel * depth * 2 * n;
    project_block(x, block.rows, weights, layer.biases + panel * 2 * n, depth, [&](int64_t m, const Vec<T>(&sum)[2]) {
      Vec<T> gate[2], slope;
      ERCN_UNROLL for (int v = 0; v < units / n; ++v) {
        gate[v] = activate<false, T>(layer.activation, sum[v], slope);
        if constexpr (GATED) gate[0] *= sigmoid(sum[1]);
        if (layer.dropout) {
          const auto bits = bits_of(scratch.words + m * kDropUnits + (first + v * n) % kDropUnits, T{});
          gate[v] = kept(gate[v], bits, *layer.dropout);
          if constexpr (GATED) gate[v] = kept(gate[v], bits >> 16, *layer.dropout);
        }
        if (partial) gate[v] = existing<T>(gate[v], first + v * n, layer.L);
        for (int64_t k = 0; k < K; ++k) {
          T* to = head_sums + (m * K + k) * n;
          store(to, load<Vec<T>>(to) + load<Vec<T>>(layer.w + k * layer.units + first + v * n) * gate[v]);
        }
      }
    });
  }
  for (int64_t i = 0; i < block.rows * K; ++i) {
    scores[i] = sum_of<T>(load<Vec<T>>(head_sums + i * n)) + layer.w_bias[i % K];
  }
}

// Largest score of a segment's head, 0 if it is -Inf: exp(s - max) is then 0 and not NaN. NaN scores pass by.
template <typename T>
ERCN_INLINE T largest(const T* scores, int64_t rows, int64_t K, T& shift) {
  T most = -__builtin_inff();
  for (int64_t m = 0; m < rows; ++m) most = scores[m * K] > most ? scores[m * K] : most;
  shift = most == -__builtin_inff() ? 0 : most;
  return most;
}

// out[d] = Σ_m e[m · K] x[m, d]
template <typename X, typename T>
ERCN_INLINE void weighted_sum(const T* e, int64_t K, Matrix<X> x, int64_t rows, int64_t D, T* out) {
  constexpr int64_t n = kLanes<T>;
  int64_t d = 0;
  for (; d + 4 * n <= D; d += 4 * n) {
    Vec<T> sum[4] = {};
    for (int64_t m = 0; m < rows; ++m) {
      ERCN_UNROLL for (int v = 0; v < 4; ++v) sum[v] += e[m * K] * load_wide(x.at + m * x.row + d + v * n);
    }
    ERCN_UNROLL for (int v = 0; v < 4; ++v) store(out + d + v * n, sum[v]);
  }
  for (; d < D; ++d) {
    T sum = 0;
    for (int64_t m = 0; m < rows; ++m) sum += e[m * K] * wide(x.at[m * x.row + d]);
    out[d] = sum;
  }
}

// The parts of max, sum and pooled of a block's segments. scores [rows, K] are lost.
template <typename E, typename T, typename X>
ERCN_INLINE void pool_block(
    const Instances<E>& in, const InstanceBlock& block, Matrix<X> x, T* scores, const SoftmaxParts<T>& parts) {
  const int64_t K = in.K;
  for (int64_t s = block.begin; s < block.end; ++s) {
    const Segment& segment = in.segments[s];
    const int64_t skip = segment.first - block.first;
    for (int64_t k = 0; k < K; ++k) {
      T* e = scores + skip * K + k;
      T shift, sum = 0;
      parts.max[s * K + k] = largest(e, segment.rows, K, shift);
      for (int64_t m = 0; m < segment.rows; ++m) sum += e[m * K] = exponential(e[m * K] - shift);
      parts.sum[s * K + k] = sum;
      weighted_sum(
          e, K, Matrix<X>{x.at + skip * x.row, x.row, 1}, segment.rows, in.D, parts.pooled + (s * K + k) * in.D);
    }
  }
}

template <typename X, typename E, typename T, typename W>
void forward(
    const Instances<E>& in, const HiddenLayer<T, W>& layer, const InstanceBlock& block, T* scores,
    const SoftmaxParts<T>& parts, void* memory) {
  const BlockScratch<X, T> scratch(in.D, in.K, layer.dropout, memory);
  const Matrix<X> x = operand(in, block.first, block.rows, scratch);
  T* own = scratch.attention;
  if (layer.branches == 2) {
    score_block<true>(in, layer, block, x, scratch, own);
  } else {
    score_block<false>(in, layer, block, x, scratch, own);
  }
  for (int64_t m = 0; m < block.rows; ++m) {
    const int64_t i = instance(in, block.first + m);
    for (int64_t k = 0; k < in.K; ++k) scores[score_at(in, i, k)] = own[m * in.K + k];
  }
  if (parts.pooled) pool_block(in, block, x, own, parts);
}

template <typename X, typename E, typename T>
void pool(
    const Instances<E>& in, const InstanceBlock& block, const T* scores, const SoftmaxParts<T>& parts, void* memory) {
  const BlockScratch<X, T> scratch(in.D, in.K, false, memory);
  T* own = scratch.attention;
  for (int64_t m = 0; m < block.rows; ++m) {
    const int64_t i = instance(in, block.first + m);
    for (int64_t k = 0; k < in.K; ++k) own[m * in.K + k] = scores[score_at(in, i, k)];
  }
  pool_block(in, block, operand(in, block.first, block.rows, scratch), own, parts);
}

// ---- backward of the softmax ----

template <typename T>
ERCN_INLINE int64_t padded_channels(int64_t D) {
  return (D + kStripChannels<T> - 1) / kStripChannels<T> * kStripChannels<T>;
}

template <typename X, typename T>
ERCN_INLINE T dot(const X* x, const T* y, int64_t D) {
  constexpr int64_t n = kLanes<T>;
  Vec<T> sum[4] = {};
  int64_t d = 0;
  for (; d + 4 * n <= D; d += 4 * n) {
    ERCN_UNROLL for (int v = 0; v < 4; ++v) sum[v] += load_wide(x + d + v * n) * load<Vec<T>>(y + d + v * n);
  }
  T total = sum_of<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; d < D; ++d) total += wide(x[d]) * y[d];
  return total;
}

template <typename X, typename E, typename T>
void dots(
    const Instances<E>& in, const InstanceBlock& block, const T* scores, const SoftmaxGradient<T>& softmax,
    void* memory) {
  const BlockScratch<X, T> scratch(in.D, in.K, false, memory);
  const int64_t columns = padded_channels<T>(in.D), K = in.K;
  Matrix<X> x{};
  if (softmax.dots) x = operand(in, block.first, block.rows, scratch);
  for (int64_t s = block.begin; s < block.end; ++s) {
    const auto [first, count, bag] = in.segments[s];
    for (int64_t k = 0; k < K; ++k) {
      T* e = scratch.attention;
      for (int64_t m = 0; m < count; ++m) e[m] = scores[score_at(in, instance(in, first + m), k)];
      T shift;
      double sum = 0, sum_dot = 0;  // an error of Σ a (ĝ·h) is in every instance alike, and adds up
      softmax.parts.max[s * K + k] = largest(e, count, 1, shift);
      for (int64_t m = 0; m < count; ++m) {
        const T weight = exponential(e[m] - shift);
        softmax.attention[(first + m) * K + k] = weight;
        sum += weight;
        if (!softmax.dots) continue;
        const T product =
            dot(x.at + (first - block.first + m) * x.row, softmax.grad_pooled + (bag * K + k) * columns, in.D);
        softmax.dots[(first + m) * K + k] = product;
        sum_dot += weight * product;
      }
      softmax.parts.sum[s * K + k] = static_cast<T>(sum);
      softmax.part_dot[s * K + k] = static_cast<T>(sum_dot);
    }
  }
}

// Head k of instance r in segment s, in a bag: e becomes a, and ds is given where dots are there.
template <typename T>
ERCN_INLINE T
finish_attention(const SoftmaxGradient<T>& softmax, int64_t K, int64_t s, int64_t bag, int64_t r, int64_t k) {
  T& a = softmax.attention[r * K + k];
  a *= softmax.scale[s * K + k];
  return softmax.dots ? a * (softmax.dots[r * K + k] - softmax.bag_dot[bag * K + k]) : 0;
}

template <typename E, typename T>
void pool_backward(
    const Instances<E>& in, const InstanceBlock& block, const SoftmaxGradient<T>& softmax, T* grad_scores, E* grad_h) {
  constexpr int64_t n = kLanes<T>;
  const int64_t columns = padded_channels<T>(in.D), K = in.K;
  for (int64_t s = block.begin; s < block.end; ++s) {
    const auto [first, count, bag] = in.segments[s];
    for (int64_t r = first; r < first + count; ++r) {
      const int64_t i = instance(in, r);
      for (int64_t k = 0; k < K; ++k) {
        const T ds = finish_attention(softmax, K, s, bag, r, k);
        if (grad_scores) grad_scores[score_at(in, i, k)] = ds;
      }
      if (!grad_h) continue;
      const T *a = softmax.attention + r * K, *grads = softmax.grad_pooled + bag * K * columns;
      E* to = grad_h + i * in.D;
      for (int64_t d = 0; d < in.D; d += n) {
        Vec<T> sum = {};
        for (int64_t k = 0; k < K; ++k) sum += a[k] * load<Vec<T>>(grads + k * columns + d);
        T stored[n];
        store(stored, sum);
        const int64_t width = in.D - d < n ? in.D - d : n;
        for (int64_t c = 0; c < width; ++c) put(to + d + c, stored[c]);
      }
    }
  }
}

// ---- backward of the hidden layer ----

template <typename E, typename T, typename W>
ERCN_INLINE T* dp_at(
    const HiddenLayer<T, W>& layer, const HiddenGradient<E, T>& gradient, int64_t branch, int64_t unit, int64_t row) {
  const int64_t u = branch * layer.units + unit;
  return gradient.dp + u / kDpUnits * gradient.dp_stride + row * kDpUnits + u % kDpUnits;
}

template <typename E, typename T, typename W>
ERCN_INLINE void store_dp(
    const HiddenLayer<T, W>& layer, const HiddenGradient<E, T>& gradient, int64_t branch, int64_t unit, int64_t row,
    Vec<T> x) {
  constexpr int64_t side = kLanes<T> < kDpUnits ? kLanes<T> : kDpUnits;
  Vec<T, side * sizeof(T)> parts[kLanes<T> / side];
  __builtin_memcpy(parts, &x, sizeof x);
  ERCN_UNROLL for (int i = 0; i < kLanes<T> / side; ++i) {
    store(dp_at(layer, gradient, branch, unit + i * side, row), parts[i]);
  }
}

// ds [rows, K] of the block's scores, what they give to w_bias, and for every row its bag's ĝ and its grad_h.
template <typename E, typename T>
ERCN_INLINE void score_gradients(
    const Instances<E>& in, const InstanceBlock& block, const SoftmaxGradient<T>& softmax,
    const ScoreGradient<T>& grad_scores, E* grad_h, T* ds, T* w_bias, const T* (&grad_pooled)[kMaxBlockRows],
    E* (&to)[kMaxBlockRows]) {
  const int64_t K = in.K;
  for (int64_t s = block.begin; s < block.end; ++s) {
    const auto [first, count, bag] = in.segments[s];
    for (int64_t r = first; r < first + count; ++r) {
      const int64_t i = instance(in, r), m = r - block.first;
      grad_pooled[m] = softmax.grad_pooled ? softmax.grad_pooled + bag * K * padded_channels<T>(in.D) : nullptr;
      to[m] = grad_h ? grad_h + i * in.D : nullptr;
      for (int64_t k = 0; k < K; ++k) {
        T sum = softmax.grad_pooled ? finish_attention(softmax, K, s, bag, r, k) : 0;
        if (grad_scores.at) {
          sum += grad_scores.at[i / in.N * grad_scores.bag + k * grad_scores.head + i % in.N * grad_scores.instance];
        }
        ds[m * K + k] = sum;
      }
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    double sum = 0;
    for (int64_t m = 0; m < block.rows; ++m) sum += ds[m * K + k];
    w_bias[k] = static_cast<T>(sum);
  }
}

// dp of the block, and its sums for the biases and w, from ds [rows, K].
template <bool GATED, typename E, typename T, typename W, typename X>
ERCN_INLINE void hidden_gradients(
    const Instances<E>& in, const HiddenLayer<T, W>& layer, const InstanceBlock& block, Matrix<X> x, const T* ds,
    const HiddenGradient<E, T>& gradient, uint32_t* words, T* parts) {
  constexpr int64_t n = kLanes<T>, units = GATED ? n : 2 * n;
  const int64_t depth = operand_depth<X>(in.D), K = in.K, dp_row = block.first - gradient.first;
  for (int64_t i = 0; i < (2 + K) * layer.units; i += n) store(parts + i, Vec<T>{});
  T *sum_v = parts, *sum_u = parts + layer.units, *sum_w = parts + 2 * layer.units;
  const auto add = [](T* to, Vec<T> x) { store(to, load<Vec<T>>(to) + x); };
  for (int64_t panel = 0; panel < layer.units / units; ++panel) {
    const int64_t first = panel * units;
    const bool partial = first + units > layer.L;
    if (layer.dropout && first % kDropUnits == 0) draw(in, *layer.dropout, block.first, block.rows, first, words);
    const X* weights = static_cast<const X*>(layer.projections) + panel * depth * 2 * n;
    project_block(x, block.rows, weights, layer.biases + panel * 2 * n, depth, [&](int64_t m, const Vec<T>(&sum)[2]) {
      ERCN_UNROLL for (int v = 0; v < units / n; ++v) {
        const int64_t unit = first + v * n;
        Vec<T> slope, t = activate<true, T>(layer.activation, sum[v], slope), s = {}, rest = {};
        if constexpr (GATED) s = sigmoid(sum[1]), rest = 1 - s;
        if (layer.dropout) {
          const auto bits = bits_of(words + m * kDropUnits + unit % kDropUnits, T{});
          t = kept(t, bits, *layer.dropout), slope = kept(slope, bits, *layer.dropout);
          if constexpr (GATED) s = kept(s, bits >> 16, *layer.dropout);
        }
        if (partial) t = existing<T>(t, unit, layer.L), slope = existing<T>(slope, unit, layer.L);
        if (GATED && partial) s = existing<T>(s, unit, layer.L), rest = existing<T>(rest, unit, layer.L);
        const Vec<T> gate = GATED ? t * s : t;
        Vec<T> dgate = {};
        for (int64_t k = 0; k < K; ++k) {
          const T scale = ds[m * K + k];
          dgate += scale * load<Vec<T>>(layer.w + k * layer.units + unit);
          add(sum_w + k * layer.units + unit, scale * gate);
        }
        if (partial) dgate = existing<T>(dgate, unit, layer.L);
        const Vec<T> dt = (GATED ? dgate * s : dgate) * slope;
        store_dp(layer, gradient, 0, unit, dp_row + m, dt);
        add(sum_v + unit, dt);
        if constexpr (GATED) {
          const Vec<T> du = dgate * gate * rest;
          store_dp(layer, gradient, 1, unit, dp_row + m, du);
          add(sum_u + unit, du);
        }
      }
    });
  }
}

template <typename T, typename W>
void pack_strip(const HiddenLayer<T, W>& layer, int64_t strip) {
  constexpr int64_t n = kStripChannels<T>;
  const int64_t d = strip * n, columns = layer.D - d < n ? layer.D - d : n;
  T* to = layer.strips + strip * layer.branches * layer.units * n;
  for (int64_t branch = 0; branch < layer.branches; ++branch) {
    const Matrix<W>& weight = branch ? layer.u : layer.v;
    T* rows = to + branch * layer.units * n;
    if (columns < n || layer.L < layer.units) {
      for (int64_t i = 0; i < layer.units * n; i += kLanes<T>) store(rows + i, Vec<T>{});
    }
    copy_matrix(Matrix<W>{weight.at + d * weight.col, weight.row, weight.col}, layer.L, columns, rows, n);
  }
}

// grad_h[m] = dp[m] [V; U] + Σ_k a[m, k] ĝ_k in one strip of channels, for ROWS rows at a time.
template <int ROWS, typename E, typename T, typename W>
ERCN_INLINE void input_rows(
    const HiddenLayer<T, W>& layer, const HiddenGradient<E, T>& gradient, int64_t& m, int64_t rows, int64_t strip,
    int64_t dp_row, const T* a, const T* const* grad_pooled, E* const* to) {
  constexpr int64_t n = kStripChannels<T>, lanes = kLanes<T>;
  const int64_t d = strip * n, columns = layer.D - d < n ? layer.D - d : n, depth = layer.branches * layer.units;
  const T* weights = layer.strips + strip * depth * n;
  for (; m + ROWS <= rows; m += ROWS) {
    Vec<T> sum[ROWS][kVecs] = {};
    for (int64_t u = 0; u < depth; u += kDpUnits) {
      tile_product<ROWS, kVecs>(
          dp_at(layer, gradient, 0, u, dp_row + m), kDpUnits, 1, weights + u * n, n, kDpUnits, sum);
    }
    T stored[ROWS][n];
    ERCN_UNROLL for (int r = 0; r < ROWS; ++r) {
      ERCN_UNROLL for (int v = 0; v < kVecs; ++v) store(stored[r] + v * lanes, sum[r][v]);
    }
#pragma GCC unroll 1
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t k = 0; grad_pooled[m + r] && k < layer.K; ++k) {
        const T* grad = grad_pooled[m + r] + k * padded_channels<T>(layer.D) + d;
        ERCN_UNROLL for (int v = 0; v < kVecs; ++v) {
          T* at = stored[r] + v * lanes;
          store(at, load<Vec<T>>(at) + a[(m + r) * layer.K + k] * load<Vec<T>>(grad + v * lanes));
        }
      }
      E* out = to[m + r] + d;
      if (columns == n) {
        for (int64_t c = 0; c < n; ++c) put(out + c, stored[r][c]);
      } else {
        for (int64_t c = 0; c < columns; ++c) put(out + c, stored[r][c]);
      }
    }
  }
}

template <typename E, typename T, typename W>
ERCN_INLINE void input_gradients(
    const HiddenLayer<T, W>& layer, const HiddenGradient<E, T>& gradient, const InstanceBlock& block, const T* a,
    const T* const* grad_pooled, E* const* to) {
  const int64_t rows = block.rows, dp_row = block.first - gradient.first;
  for (int64_t strip = 0; strip < padded_channels<T>(layer.D) / kStripChannels<T>; ++strip) {
    int64_t m = 0;
    input_rows<kRows>(layer, gradient, m, rows, strip, dp_row, a, grad_pooled, to);
    input_rows<kRows / 2>(layer, gradient, m, rows, strip, dp_row, a, grad_pooled, to);
    input_rows<1>(layer, gradient, m, rows, strip, dp_row, a, grad_pooled, to);
  }
}

template <typename X, typename E, typename T, typename W>
void backward(
    const Instances<E>& in, const HiddenLayer<T, W>& layer, const InstanceBlock& block,
    const SoftmaxGradient<T>& softmax, const ScoreGradient<T>& grad_scores, const HiddenGradient<E, T>& gradient,
    int64_t part, void* memory) {
  const BlockScratch<X, T> scratch(in.D, in.K, layer.dropout, memory);
  const Matrix<X> x = operand(in, block.first, block.rows, scratch);
  T *ds = scratch.grad_scores, *parts = gradient.parts + part * ((2 + in.K) * layer.units + in.K);
  const T* grad_pooled[kMaxBlockRows];
  E* to[kMaxBlockRows];
  score_gradients(
      in, block, softmax, grad_scores, gradient.grad_h, ds, parts + (2 + in.K) * layer.units, grad_pooled, to);
  if (layer.branches == 2) {
    hidden_gradients<true>(in, layer, block, x, ds, gradient, scratch.words, parts);
  } else {
    hidden_gradients<false>(in, layer, block, x, ds, gradient, scratch.words, parts);
  }
  if (!gradient.grad_h) return;
  input_gradients(layer, gradient, block, softmax.attention + block.first * in.K, grad_pooled, to);
}

// Columns of a weight tile, and a row of it, which a cache line keeps from being a power of two.
template <typename T>
constexpr int64_t kTileColumns = kStripGroup * kStripChannels<T>;
template <typename T>
constexpr int64_t kTileRow = kTileColumns<T> + 64 / sizeof(T);

template <typename E, typename T, typename W>
void add_weight(
    const Instances<E>& in, const HiddenLayer<T, W>& layer, const HiddenGradient<E, T>& gradient, int64_t rows,
    const WeightTile& tile, T* grad, T* scratch) {
  constexpr int64_t n = kStripChannels<T>, row = kTileRow<T>;
  const int64_t units = layer.units - tile.unit < kUnitGroup ? layer.units - tile.unit : kUnitGroup;
  const int64_t d = tile.strip * n, columns = in.D - d < kTileColumns<T> ? in.D - d : kTileColumns<T>;
  T *sum = scratch, *h = scratch + kUnitGroup * row;  // [unit, row], [instance of a slice, row]
  for (int64_t i = 0; i < units * row; i += kLanes<T>) store(sum + i, Vec<T>{});
  if (columns % n) {
    for (int64_t i = 0; i < kSlice * row; i += kLanes<T>) store(h + i, Vec<T>{});
  }
  for (int64_t r = 0; r < rows; r += kSlice) {
    const int64_t depth = rows - r < kSlice ? rows - r : kSlice;
    gather(in, gradient.first + r, depth, d, columns, h, row);
    for (int64_t c = 0; c < columns; c += n) {
      for (int64_t m = 0; m < units; m += kRows) {
        tile_add_product<kRows, kVecs, Vec<T>>(
            dp_at(layer, gradient, tile.branch, tile.unit + m, r), 1, kDpUnits, h + c, row, depth, sum + m * row + c,
            row);
      }
    }
  }
  for (int64_t l = 0; l < units && tile.unit + l < layer.L; ++l) {
    T* to = grad + (tile.unit + l) * in.D + d;
    for (int64_t c = 0; c < columns; ++c) to[c] += sum[l * row + c];
  }
}

template <typename E, typename T, typename W>
PoolKernel<E, T, W> pool_kernel() {
  using X = Operand<E, T, W>;
  return {
      .lanes = kLanes<T>,
      .strip = kStripChannels<T>,
      .operand_bytes = sizeof(X),
      .pack_panel = pack_panel<X, T, W>,
      .pack_strip = pack_strip<T, W>,
      .block_scratch = block_scratch<X, T>,
      .forward = forward<X, E, T, W>,
      .pool = pool<X, E, T>,
      .dots = dots<X, E, T>,
      .backward = backward<X, E, T, W>,
      .pool_backward = pool_backward<E, T>,
      .weight_scratch = (kUnitGroup + kSlice) * kTileRow<T>,
      .add_weight = add_weight<E, T, W>};
}

}  // namespace ercn::ERCN_ISA
