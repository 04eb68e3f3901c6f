// The gradients that are products with dP.
#include "pool/generic/kernels.h"
#include "pool/generic/segment_view.h"

namespace ercn::pool {
namespace {

// One block: a segment and kGradientChannels channels.
template <typename Precision>
struct PoolRowGradient {
  using Element = typename Precision::Element;
  using Mainloop = GemmMainloop<Precision, Along::kK, Along::kOther>;
  using Params = PackedParams<RowGradientParams>;
  using Shared = unsigned char[Mainloop::kBytes];
  static constexpr int kThreads = 128, kMinBlocks = 2;
  struct Source {
    static constexpr bool kMasked = false;
    const Element *branch_grads, *projections;
    int columns, depth, channels;

    ERCN_DEVICE Runs<Element> a(int step) const {
      return {branch_grads + step * Mainloop::kDepth, columns, 1, kSegmentRows, Mainloop::kDepth, true};
    }
    ERCN_DEVICE Runs<Element> b(int step) const {
      return {projections + int64_t{step} * Mainloop::kDepth * depth, depth, 1, Mainloop::kDepth, channels, true};
    }
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    const Problem& problem = p.problem;
    const int64_t in_chunk = arch::block_index().x, slot = p.dp.first_slot + in_chunk;
    const Segment segment = segment_at(problem.bags, slot);
    if (segment.rows == 0) return;
    const int first = arch::block_index().y * kGradientChannels, columns = column_count(columns_of(problem));
    const Source source{
        static_cast<const Element*>(p.dp.data) + in_chunk * kSegmentRows * columns,
        static_cast<const Element*>(p.packed.projections) + first, columns, p.packed.depth, p.packed.depth - first};
    Sums sums;
    Mainloop::run(sums, columns / Mainloop::kDepth, source, memory);

    const float inverse = p.dp.scale == nullptr ? 1 : p.dp.scale[1];
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

// One block: kGradientColumns columns of dP, kGradientChannels channels, and a split of the slots.
template <typename Precision, bool CHANNELS_FIRST>
struct PoolWeightGradient {
  using Element = typename Precision::Element;
  using Mainloop = GemmMainloop<Precision, Along::kOther, CHANNELS_FIRST ? Along::kK : Along::kOther>;
  static constexpr int kThreads = 128, kMinBlocks = 2, kDepth = Mainloop::kDepth;
  static constexpr int kSteps = kSegmentRows / kDepth;  // of a segment
  using Params = WeightGradientParams;
  using Shared = unsigned char[Mainloop::kBytes];
  struct Source {
    static constexpr bool kMasked = true;
    const Params& p;
    int64_t begin;  // slot
    int column, channel;

    ERCN_DEVICE Segment segment(int step) const { return segment_at(p.problem.bags, begin + step / kSteps); }
    ERCN_DEVICE Runs<Element> a(int step) const {
      const int64_t pitch = column_count(columns_of(p.problem)), slot = begin + step / kSteps;
      const int64_t row = (slot - p.dp.first_slot) * kSegmentRows + step % kSteps * kDepth;
      const Element* from = static_cast<const Element*>(p.dp.data) + row * pitch + column;
      return {from, pitch, 1, segment(step).rows > 0 ? kDepth : 0, kGradientColumns, true};
    }
    ERCN_DEVICE Runs<Element> b(int step) const {
      const SegmentView<Element> h(p.problem, segment(step));
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
    const int tile = arch::block_index().x, split = arch::block_index().y;
    const int column = tile % tiles * kGradientColumns, channel = tile / tiles * kGradientChannels;
    const Range slots = split_range(p.dp.last_slot - p.dp.first_slot, p.tiling.splits, split);
    const Source source{p, p.dp.first_slot + slots.begin, column, channel};
    Sums sums;
    Mainloop::run(sums, static_cast<int>(slots.end - slots.begin) * kSteps, source, memory);

    const float inverse = p.dp.scale == nullptr ? 1 : p.dp.scale[1];
#pragma unroll
    for (int m = 0; m < Sums::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Column at = column_at(columns, column + Sums::row(m, 2 * half));
        if (at.unit >= L) continue;
        float* to = p.parts + (int64_t{split} * p.tiling.units + at.branch * L + at.unit) * D + channel;
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

void row_gradient(const PackedParams<RowGradientParams>& p, const arch::Stream& stream) {
  const int slots = static_cast<int>(p.dp.last_slot - p.dp.first_slot);
  const arch::Grid grid{slots, arch::divide_up(p.problem.D, kGradientChannels)};
  with_precision(p.problem.type, p.problem.exact, [&](auto precision) {
    using Kernel = PoolRowGradient<decltype(precision)>;
    arch::launch<Kernel>(p, grid, sizeof(typename Kernel::Shared), stream);
  });
}

void weight_gradient(const WeightGradientParams& p, const arch::Stream& stream) {
  launch<PoolWeightGradient>(p, {p.tiling.tiles, p.tiling.splits}, stream);
}

}  // namespace ercn::pool
