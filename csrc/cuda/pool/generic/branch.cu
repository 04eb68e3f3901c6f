// dP and the gradients of w and of the biases. One block: a segment, kColumns columns at a time.
#include "pool/generic/projection.h"

namespace ercn::pool {
namespace {

template <typename Precision, bool CHANNELS_FIRST>
struct PoolBranch {
  using Element = typename Precision::Element;
  using Params = PackedParams<BranchParams>;
  static constexpr int kThreads = 128, kMinBlocks = Precision::kExact ? 2 : 3;
  static constexpr int kPitch = kColumns + 8;  // of P in shared memory, without bank conflicts
  struct Shared {
    union {
      unsigned char stages[Projection<Precision, CHANNELS_FIRST>::kBytes];
      float products[kSegmentRows][kPitch];
    };
    float columns[2][kColumns / 2];  // of either half of the rows
    uint32_t real[kSegmentRows / 32];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int64_t slot = p.dp.first_slot + arch::block_index().x;
    const Segment segment = segment_at(p.problem.bags, slot);
    if (segment.rows == 0) return;
    store_real_rows(p.problem.mask, segment, shared.real);
    const SegmentView<Element> h(p.problem, segment);
    const int units = p.problem.gated ? kColumns / 2 : kColumns;
    for (int group = 0; group * units < p.problem.L; ++group) {
      Sums sums;
      project<Precision, CHANNELS_FIRST>(sums, h, p.packed, group, shared.stages);
      if (p.problem.gated) {
        finish<true>(p, segment, slot, sums, group, shared);
      } else {
        finish<false>(p, segment, slot, sums, group, shared);
      }
    }
  }

  // A thread has one unit, and half of the rows if gated. P becomes the kept values and σ, and then dt and dσ.
  template <bool GATED>
  ERCN_DEVICE static void finish(
      const Params& p, const Segment& segment, int64_t slot, Sums& sums, int group, Shared& shared) {
    constexpr int kBranches = GATED ? 2 : 1, kUnits = kColumns / kBranches, kRows = kSegmentRows / kBranches;
    const int L = p.problem.L, K = p.problem.K, units = padded_units({L, GATED}), first = group * kUnits;
    const Dropout& dropout = p.problem.dropout;
    if (dropout.seed != nullptr) drop<GATED>(dropout, segment.first, group, sums);
#pragma unroll
    for (int m = 0; m < Sums::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Sums::kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          store_pair(&shared.products[Sums::row(m, i)][Sums::column(n, 0)], sums.at[m][n][i], sums.at[m][n][i + 1]);
        }
      }
    }
    arch::sync_threads();
    const int thread = arch::thread_index(), column = GATED ? thread % kUnits / 32 * 64 + thread % 32 : thread;
    const int unit = column_at({L, GATED}, column).unit;
    const int begin = thread / kUnits * kRows, end = begin + kRows;
    const bool exists = first + unit < L;
    const float* biases = p.packed.biases + group * kColumns + column;
    const float v_bias = biases[0], u_bias = GATED ? biases[32] : 0;
    uint64_t passes = ~uint64_t{0};  // rows that dropout keeps, if not gated
    float dt_sum = 0, ds_sum = 0;
    with_activation(p.problem.activation, [&](auto activation) {
      constexpr Activation A = decltype(activation)::value;
      for (int row = begin; row < end; ++row) {
        float* at = &shared.products[row][column];
        const bool dropped = !GATED && arch::float_bits(at[0]) == kDropped;
        if (dropped) passes &= ~(uint64_t{1} << row);
        // h may be anything in a row that is not real, and a unit that does not exist is NaN where h is infinite.
        const bool real = exists && !dropped && (shared.real[row / 32] >> row % 32 & 1) != 0;
        const Branches on = branches<A, true>(at[0] + v_bias, GATED ? at[32] + u_bias : 0);
        at[0] = real ? on.kept : 0;
        if constexpr (GATED) at[32] = real ? on.gate : 0;
      }
      if (p.part_heads != nullptr) {
        for (int k = 0; k < K; ++k) {
          const float* ds = p.score_grad + score_offset(p.problem.bags, segment, k, K);
          float sum = 0;
          for (int row = begin; row < end; ++row) {
            const float *at = &shared.products[row][column], t = value_of<A>(at[0]);
            sum += at_row(ds, segment, row) * (GATED ? t * at[32] : t);
          }
          add_column<GATED>(dropout.scale * sum, p.part_heads + (slot * K + k) * L + first, unit, exists, shared);
        }
      }

      const int64_t pitch = column_count({L, GATED});
      const float scale = p.dp.scale == nullptr ? 1 : p.dp.scale[0];
      Element* to = static_cast<Element*>(p.dp.data);
      if (to != nullptr) to += (slot - p.dp.first_slot) * kSegmentRows * pitch + group * kColumns + column;
      for (int row = begin; row < end; ++row) {
        float dg = 0;
        for (int k = 0; k < K; ++k) {
          const float* ds = p.score_grad + score_offset(p.problem.bags, segment, k, K);
          dg += at_row(ds, segment, row) * p.packed.heads[int64_t{k} * units + first + unit];
        }
        dg = passes >> row & 1 ? dropout.scale * dg : 0;
        const float *at = &shared.products[row][column], s = GATED ? at[32] : 1;
        const float dt = dg * s * slope_of<A>(at[0]), dsigma = dg * value_of<A>(at[0]) * s * (1 - s);
        dt_sum += dt;
        ds_sum += dsigma;
        if (to == nullptr) continue;
        to[row * pitch] = arch::from_float<Element>(scale * dt);
        if constexpr (GATED) to[row * pitch + 32] = arch::from_float<Element>(scale * dsigma);
      }
    });
    if (p.part_biases != nullptr) {
      float* sums_to = p.part_biases + slot * kBranches * L + first;
      add_column<GATED>(dt_sum, sums_to, unit, exists, shared);
      if constexpr (GATED) add_column<GATED>(ds_sum, sums_to + L, unit, exists, shared);
    }
    arch::sync_threads();  // the stages may be written again
  }

  // ds of a row, 0 beyond the segment.
  ERCN_DEVICE static float at_row(const float* ds, const Segment& segment, int row) {
    return row < segment.rows ? ds[row] : 0;
  }

  // to[unit] = the sum over all rows, from this thread's sum.
  template <bool GATED>
  ERCN_DEVICE static void add_column(float sum, float* to, int unit, bool exists, Shared& shared) {
    constexpr int kUnits = kColumns / (GATED ? 2 : 1);
    const int thread = arch::thread_index(), own = thread % kUnits;
    if constexpr (GATED) {
      shared.columns[thread / kUnits][own] = sum;
      arch::sync_threads();
      sum = shared.columns[0][own] + shared.columns[1][own];
      arch::sync_threads();
    }
    if (thread < kUnits && exists) to[unit] = sum;
  }
};

}  // namespace

void branch(const PackedParams<BranchParams>& p, const arch::Stream& stream) {
  launch<PoolBranch>(p, {static_cast<int>(p.dp.last_slot - p.dp.first_slot)}, stream);
}

}  // namespace ercn::pool
