// One block: a segment, 128 columns at a time.
#include "pool/projection.h"

namespace ercn::pool {
namespace {

template <typename Precision, bool CHANNELS_FIRST>
struct PoolBranch {
  using Element = typename Precision::Element;
  using Params = PackedParams<BranchParams>;
  static constexpr int kThreads = 128, kMinBlocks = 2;
  static constexpr int kPitch = kColumns + 8;  // of P in shared memory: no bank is met twice
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
    const int64_t slot = p.first_slot + arch::block_index().x;
    const Segment segment = segment_at(p.problem.bags, slot);
    if (segment.rows == 0) return;
    if (arch::uniform_warp_index() < kSegmentRows / 32) {
      const uint32_t real = arch::ballot(is_real(p.problem, segment, arch::thread_index()));
      if (arch::lane_index() == 0) shared.real[arch::warp_index()] = real;
    }
    const Instances<Element> h(p.problem, segment);
    const int groups = column_count(columns_of(p.problem)) / kColumns;
    for (int group = 0; group < groups; ++group) {
      Sums sums;
      project<Precision, CHANNELS_FIRST>(sums, h, p.packed, group, shared.stages);
      if (p.problem.gated) {
        finish<true>(p, segment, slot, sums, group, shared);
      } else {
        finish<false>(p, segment, slot, sums, group, shared);
      }
    }
  }

  // A thread has one unit, and half of the rows if gated. Its products become t and σ, and then dt and dσ.
  template <bool GATED>
  ERCN_DEVICE static void finish(
      const Params& p, const Segment& segment, int64_t slot, const Sums& sums, int group, Shared& shared) {
    constexpr int kBranches = GATED ? 2 : 1, kUnits = kColumns / kBranches, kRows = kSegmentRows / kBranches;
    const int L = p.problem.L, K = p.problem.K, units = padded_units({L, GATED}), first = group * kUnits;
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
    const int unit = arch::thread_index() % kUnits, begin = arch::thread_index() / kUnits * kRows, end = begin + kRows;
    const int column = GATED ? unit / 32 * 64 + unit % 32 : unit;
    const bool exists = first + unit < L;
    const float* biases = p.packed.biases + group * kColumns + column;
    const float v_bias = biases[0], u_bias = GATED ? biases[32] : 0;
    for (int row = begin; row < end; ++row) {
      // Where a row is not real h may be anything, and a unit that does not exist is NaN where h is infinite.
      const bool real = exists && (shared.real[row / 32] >> row % 32 & 1) != 0;
      float* at = &shared.products[row][column];
      const Activations on = activate_small(at[0] + v_bias, GATED ? at[32] + u_bias : 0);
      at[0] = real ? on.t : 0;
      if constexpr (GATED) at[32] = real ? on.gate : 0;
    }
    if (p.part_heads != nullptr) {
      for (int k = 0; k < K; ++k) {
        const float* ds = p.score_grad + score_offset(p.problem.bags, segment, k, K);
        float sum = 0;
        for (int row = begin; row < end; ++row) {
          const float* at = &shared.products[row][column];
          sum += at_row(ds, segment, row) * (GATED ? at[0] * at[32] : at[0]);
        }
        add_column<GATED>(sum, p.part_heads + (slot * K + k) * L + first, exists, shared);
      }
    }

    const int64_t pitch = column_count({L, GATED});
    const float scale = p.scale == nullptr ? 1 : p.scale[0];
    Element* to = static_cast<Element*>(p.branch_grads);
    if (to != nullptr) to += (slot - p.first_slot) * kSegmentRows * pitch + group * kColumns + column;
    float dt_sum = 0, ds_sum = 0;
    for (int row = begin; row < end; ++row) {
      float dg = 0;
      for (int k = 0; k < K; ++k) {
        const float* ds = p.score_grad + score_offset(p.problem.bags, segment, k, K);
        dg += at_row(ds, segment, row) * p.packed.heads[int64_t{k} * units + first + unit];
      }
      const float *at = &shared.products[row][column], t = at[0], s = GATED ? at[32] : 1;
      const float dt = dg * s * (1 - t * t), dsigma = dg * t * s * (1 - s);
      dt_sum += dt;
      ds_sum += dsigma;
      if (to == nullptr) continue;
      to[row * pitch] = arch::from_float<Element>(scale * dt);
      if constexpr (GATED) to[row * pitch + 32] = arch::from_float<Element>(scale * dsigma);
    }
    if (p.part_biases != nullptr) {
      float* sums_to = p.part_biases + slot * kBranches * L + first;
      add_column<GATED>(dt_sum, sums_to, exists, shared);
      if constexpr (GATED) add_column<GATED>(ds_sum, sums_to + L, exists, shared);
    }
    arch::sync_threads();  // the stages may be written again
  }

  // ds of a row, 0 beyond the segment.
  ERCN_DEVICE static float at_row(const float* ds, const Segment& segment, int row) {
    return row < segment.rows ? ds[row] : 0;
  }

  // to[unit] = the sum over all rows from those of this thread.
  template <bool GATED>
  ERCN_DEVICE static void add_column(float sum, float* to, bool exists, Shared& shared) {
    constexpr int kUnits = kColumns / (GATED ? 2 : 1);
    const int thread = arch::thread_index(), unit = thread % kUnits;
    if constexpr (GATED) {
      shared.columns[thread / kUnits][unit] = sum;
      arch::sync_threads();
      sum = shared.columns[0][unit] + shared.columns[1][unit];
      arch::sync_threads();
    }
    if (thread < kUnits && exists) to[unit] = sum;
  }
};

}  // namespace

void branch(const PackedParams<BranchParams>& p, const arch::Stream& stream) {
  launch<PoolBranch>(p, {static_cast<int>(p.last_slot - p.first_slot)}, stream);
}

}  // namespace ercn::pool
