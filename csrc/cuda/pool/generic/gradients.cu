// The gradients that are products with dP.
#include "pool/generic/instances.h"
#include "pool/generic/kernels.h"

namespace ercn::pool {
namespace {

// One block: a segment and kGradientChannels channels.
template <typename Precision>
struct PoolRowGradient {
  using Element = typename Precision::Element;
  using Multiply = Product<Precision, Along::kK, Along::kOther>;
  using Params = PackedParams<RowsParams>;
  using Shared = unsigned char[Multiply::kBytes];
  static constexpr int kThreads = 128, kMinBlocks = 2;
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
    const int64_t in_workspace = arch::block_index().x, slot = p.first_slot + in_workspace;
    const Segment segment = segment_at(problem.bags, slot);
    if (segment.rows == 0) return;
    const int first = arch::block_index().y * kGradientChannels, columns = column_count(columns_of(problem));
    const Source source{
        static_cast<const Element*>(p.branch_grads) + in_workspace * kSegmentRows * columns,
        static_cast<const Element*>(p.packed.projections) + first, columns, p.packed.depth, p.packed.depth - first};
    Sums sums;
    Multiply::run(sums, columns / Multiply::kDepth, source, memory);

    const float inverse = p.scale == nullptr ? 1 : p.scale[1];
    Element* rows = static_cast<Element*>(p.grad_h) + segment.first * problem.D;
    const Element* grad = static_cast<const Element*>(p.grad_pooled) + segment.bag * problem.K * problem.D;
#pragma unroll
    for (int m = 0; m < Sums::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Sums::row(m, 2 * half);
        if (row >= segment.rows) continue;
        const bool real = p.real[slot * 2 + row / 32] >> row % 32 & 1;
        float x[Sums::kColumnTiles][2];
#pragma unroll
        for (int n = 0; n < Sums::kColumnTiles; ++n) {
          for (int i = 0; i < 2; ++i) x[n][i] = real ? inverse * sums.at[m][n][2 * half + i] : 0;
        }
        for (int k = 0; real && p.attention != nullptr && k < problem.K; ++k) {
          const float a = p.attention[score_offset(problem.bags, segment, k, problem.K) + row];
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

// One block: kGradientColumns columns of dP, kGradientChannels channels, and a share of the slots.
template <typename Precision, bool CHANNELS_FIRST>
struct PoolWeightGradient {
  using Element = typename Precision::Element;
  using Multiply = Product<Precision, Along::kOther, CHANNELS_FIRST ? Along::kK : Along::kOther>;
  static constexpr int kThreads = 128, kMinBlocks = 2, kDepth = Multiply::kDepth;
  static constexpr int kSteps = kSegmentRows / kDepth;  // of a segment
  using Params = WeightsParams;
  using Shared = unsigned char[Multiply::kBytes];
  struct Source {
    static constexpr bool kMasked = true;
    const Params& p;
    int64_t begin;  // slot
    int column, channel;

    ERCN_DEVICE Segment segment(int step) const { return segment_at(p.problem.bags, begin + step / kSteps); }
    ERCN_DEVICE Runs<Element> a(int step) const {
      const int64_t pitch = column_count(columns_of(p.problem)), slot = begin + step / kSteps;
      const int64_t row = (slot - p.first_slot) * kSegmentRows + step % kSteps * kDepth;
      const Element* from = static_cast<const Element*>(p.branch_grads) + row * pitch + column;
      return {from, pitch, 1, segment(step).rows > 0 ? kDepth : 0, kGradientColumns, true};
    }
    ERCN_DEVICE Runs<Element> b(int step) const {
      const Instances<Element> h(p.problem, segment(step));
      const int row = step % kSteps * kDepth;
      return CHANNELS_FIRST ? h.as_channels(row, channel) : h.as_rows(row, channel, kGradientChannels);
    }
    ERCN_DEVICE uint32_t mask(int step) const {
      const int row = step % kSteps * kDepth;
      return p.real[(begin + step / kSteps) * 2 + row / 32] >> row % 32;
    }
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    const Columns columns = columns_of(p.problem);
    const int tiles = column_count(columns) / kGradientColumns, D = p.problem.D, L = p.problem.L;
    const int column = static_cast<int>(arch::block_index().x) % tiles * kGradientColumns;
    const int channel = static_cast<int>(arch::block_index().x) / tiles * kGradientChannels, split = arch::block_index().y;
    const Range share = share_of(p.last_slot - p.first_slot, p.shares.splits, split);
    const Source source{p, p.first_slot + share.begin, column, channel};
    Sums sums;
    Multiply::run(sums, static_cast<int>(share.end - share.begin) * kSteps, source, memory);

    const float inverse = p.scale == nullptr ? 1 : p.scale[1];
#pragma unroll
    for (int m = 0; m < Sums::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Column at = column_at(columns, column + Sums::row(m, 2 * half));
        if (at.unit >= L) continue;
        float* to = p.parts + (int64_t{split} * p.shares.units + at.branch * L + at.unit) * D + channel;
#pragma unroll
        for (int n = 0; n < Sums::kColumnTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int d = Sums::column(n, i);
            if (channel + d >= D) continue;
            const float sum = inverse * sums.at[m][n][2 * half + i];
            to[d] = p.accumulate ? to[d] + sum : sum;
          }
        }
      }
    }
  }
};

}  // namespace

void row_gradient(const PackedParams<RowsParams>& p, const arch::Stream& stream) {
  const arch::Grid grid{static_cast<int>(p.last_slot - p.first_slot), arch::divide_up(p.problem.D, kGradientChannels)};
  with_precision(p.problem.type, p.problem.exact, [&](auto precision) {
    using Kernel = PoolRowGradient<decltype(precision)>;
    arch::launch<Kernel>(p, grid, sizeof(typename Kernel::Shared), stream);
  });
}

void weight_gradient(const WeightsParams& p, const arch::Stream& stream) {
  launch<PoolWeightGradient>(p, {p.shares.blocks, p.shares.splits}, stream);
}

}  // namespace ercn::pool
