#include "pool/gradients.h"

#include "pool/instances.h"

namespace ercn::pool {
namespace {

constexpr int kChannels = 128;  // of a block

// One block: a segment and kChannels channels.
template <typename Precision>
struct PoolRowGradient {
  using Element = typename Precision::Element;
  using Multiply = Product<Precision, Along::kK, Along::kOther>;
  static constexpr int kThreads = 128, kMinBlocks = 2;
  struct Params {
    Problem problem;
    Packed<Element> weights;
    RowGradient<Element> of;
    int columns;
  };
  struct Source {
    static constexpr bool kMasked = false;
    const Element *branch_grads, *projections;
    int columns, depth, channels;

    ERCN_DEVICE Runs<Element> a(int step) const {
      return {branch_grads + step * Multiply::kDepth, columns, 1, kSegmentRows, Multiply::kDepth, true};
    }
    ERCN_DEVICE Runs<Element> b(int step) const {
      return {projections + int64_t{step} * Multiply::kDepth * depth, depth, 1, Multiply::kDepth, channels, true};
    }
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    const Problem& problem = p.problem;
    const int64_t in_workspace = arch::block_index().x, slot = p.of.first_slot + in_workspace;
    const Segment segment = segment_at(problem.bags, slot);
    if (segment.rows == 0) return;
    const int first = arch::block_index().y * kChannels;
    const Source source{
        p.of.branch_grads + in_workspace * kSegmentRows * p.columns, p.weights.projections + first, p.columns,
        p.weights.depth, p.weights.depth - first};
    Sums sums;
    Multiply::run(sums, p.columns / Multiply::kDepth, source, memory);

    const float inverse = p.of.scale == nullptr ? 1 : p.of.scale[1];
    Element* rows = p.of.grad_h + segment.first * problem.D;
    const Element* grad = p.of.grad_pooled + segment.bag * problem.K * problem.D;
#pragma unroll
    for (int m = 0; m < Sums::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Sums::row(m, 2 * half);
        if (row >= segment.rows) continue;
        const bool real = p.of.real[slot * 2 + row / 32] >> row % 32 & 1;
        float x[Sums::kColumnTiles][2];
#pragma unroll
        for (int n = 0; n < Sums::kColumnTiles; ++n) {
          for (int i = 0; i < 2; ++i) x[n][i] = real ? inverse * sums.at[m][n][2 * half + i] : 0;
        }
        for (int k = 0; real && p.of.attention != nullptr && k < problem.K; ++k) {
          const float a = p.of.attention[score_offset(problem.bags, segment, k, problem.K) + row];
#pragma unroll
          for (int n = 0; n < Sums::kColumnTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int d = first + Sums::column(n, i);
              if (d < problem.D) x[n][i] += a * arch::to_float(grad[int64_t{k} * problem.D + d]);
            }
          }
        }
#pragma unroll
        for (int n = 0; n < Sums::kColumnTiles; ++n) {
          const int d = first + Sums::column(n, 0);
          Element* to = rows + int64_t{row} * problem.D + d;
          if (problem.D % 2 == 0) {
            if (d < problem.D) store_pair(to, x[n][0], x[n][1]);
          } else {
            if (d < problem.D) to[0] = arch::from_float<Element>(x[n][0]);
            if (d + 1 < problem.D) to[1] = arch::from_float<Element>(x[n][1]);
          }
        }
      }
    }
  }
};

// One block: 64 columns of dP, kChannels channels, and a share of the slots.
template <typename Precision, bool CHANNELS_FIRST>
struct PoolWeightGradient {
  using Element = typename Precision::Element;
  using Multiply = Product<Precision, Along::kOther, CHANNELS_FIRST ? Along::kK : Along::kOther>;
  static constexpr int kThreads = 128, kMinBlocks = 2, kSide = 64, kDepth = Multiply::kDepth;
  static constexpr int kSteps = kSegmentRows / kDepth;  // of a segment
  struct Params {
    Problem problem;
    Columns columns;
    WeightGradient<Element> of;
    bool vector;
  };
  struct Source {
    static constexpr bool kMasked = true;
    const Params& p;
    int64_t begin;  // slot
    int column, channel;

    ERCN_DEVICE Segment segment(int step) const { return segment_at(p.problem.bags, begin + step / kSteps); }
    ERCN_DEVICE Runs<Element> a(int step) const {
      const int64_t pitch = column_count(p.columns), slot = begin + step / kSteps;
      const int64_t row = (slot - p.of.first_slot) * kSegmentRows + step % kSteps * kDepth;
      return {p.of.branch_grads + row * pitch + column, pitch, 1, segment(step).rows > 0 ? kDepth : 0, kSide, true};
    }
    ERCN_DEVICE Runs<Element> b(int step) const {
      const Instances<Element> h(p.problem, segment(step), p.vector);
      const int row = step % kSteps * kDepth;
      return CHANNELS_FIRST ? h.as_channels(row, channel) : h.as_rows(row, channel, kChannels);
    }
    ERCN_DEVICE uint32_t mask(int step) const {
      const int row = step % kSteps * kDepth;
      return p.of.real[(begin + step / kSteps) * 2 + row / 32] >> row % 32;
    }
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    const int tiles = column_count(p.columns) / kSide, D = p.problem.D, L = p.columns.L;
    const int column = static_cast<int>(arch::block_index().x) % tiles * kSide;
    const int channel = static_cast<int>(arch::block_index().x) / tiles * kChannels, split = arch::block_index().y;
    const Range share = share_of(p.of.last_slot - p.of.first_slot, p.of.splits, split);
    const Source source{p, p.of.first_slot + share.begin, column, channel};
    Sums sums;
    Multiply::run(sums, static_cast<int>(share.end - share.begin) * kSteps, source, memory);

    const float inverse = p.of.scale == nullptr ? 1 : p.of.scale[1];
    const int branches = p.columns.gated ? 2 : 1;
#pragma unroll
    for (int m = 0; m < Sums::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Column at = column_at(p.columns, column + Sums::row(m, 2 * half));
        if (at.unit >= L) continue;
        float* to = p.of.parts + ((int64_t{split} * branches + at.branch) * L + at.unit) * D + channel;
#pragma unroll
        for (int n = 0; n < Sums::kColumnTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int d = Sums::column(n, i);
            if (channel + d >= D) continue;
            const float sum = inverse * sums.at[m][n][2 * half + i];
            to[d] = p.of.accumulate ? to[d] + sum : sum;
          }
        }
      }
    }
  }
};

template <typename Precision, bool CHANNELS_FIRST>
void run(
    const Problem& problem, const Columns& columns, const WeightGradient<typename Precision::Element>& of, bool vector,
    const arch::Stream& stream) {
  using Kernel = PoolWeightGradient<Precision, CHANNELS_FIRST>;
  arch::launch<Kernel>(
      {problem, columns, of, vector}, {weight_gradient_blocks(problem.D, columns), of.splits}, Kernel::Multiply::kBytes,
      stream);
}

}  // namespace

template <typename Precision>
void row_gradient(
    const Problem& problem, const Packed<typename Precision::Element>& weights,
    const RowGradient<typename Precision::Element>& of, bool gated, const arch::Stream& stream) {
  using Kernel = PoolRowGradient<Precision>;
  const arch::Grid grid{static_cast<int>(of.last_slot - of.first_slot), arch::divide_up(problem.D, kChannels)};
  arch::launch<Kernel>(
      {problem, weights, of, column_count({problem.L, gated})}, grid, Kernel::Multiply::kBytes, stream);
}

template <typename Precision>
void weight_gradient(
    const Problem& problem, const WeightGradient<typename Precision::Element>& of, bool gated,
    const arch::Stream& stream) {
  const Layout layout = layout_of(problem, sizeof(typename Precision::Element));
  const Columns columns{problem.L, gated};
  if (layout.channels_first) {
    run<Precision, true>(problem, columns, of, layout.vector, stream);
  } else {
    run<Precision, false>(problem, columns, of, layout.vector, stream);
  }
}

#define ERCN_INSTANTIATE(PRECISION, ELEMENT)                                                                      \
  template void row_gradient<PRECISION>(                                                                          \
      const Problem&, const Packed<ELEMENT>&, const RowGradient<ELEMENT>&, bool, const arch::Stream&);            \
  template void weight_gradient<PRECISION>(const Problem&, const WeightGradient<ELEMENT>&, bool, const arch::Stream&);
ERCN_INSTANTIATE(affinity::BFloat16, arch::bf16)
ERCN_INSTANTIATE(affinity::Float16, arch::fp16)
ERCN_INSTANTIATE(affinity::TensorFloat32, float)
ERCN_INSTANTIATE(affinity::Float32, float)
#undef ERCN_INSTANTIATE

}  // namespace ercn::pool
