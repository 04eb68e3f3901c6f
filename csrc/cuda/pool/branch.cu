// One block: a segment, 128 columns at a time.
#include "pool/branch.h"

#include "pool/projection.h"

namespace ercn::pool {
namespace {

template <typename Precision, bool CHANNELS_FIRST>
struct PoolBranch {
  using Element = typename Precision::Element;
  static constexpr int kThreads = 128, kMinBlocks = 2;
  struct Params {
    Problem problem;
    Packed<Element> weights;
    Branch<Element> of;
    bool gated, vector;
  };
  struct Shared {
    unsigned char stages[Projection<Precision, CHANNELS_FIRST>::kBytes];
    float columns[2][kColumns];  // of either half of the rows
    uint32_t real[kSegmentRows / 32];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int64_t slot = p.of.first_slot + arch::block_index().x;
    const Segment segment = segment_at(p.problem.bags, slot);
    if (segment.rows == 0) return write_zeros(p, slot);
    if (arch::warp_index() < kSegmentRows / 32) {
      const uint32_t real = arch::ballot(is_real(p.problem, segment, arch::thread_index()));
      if (arch::lane_index() == 0) shared.real[arch::warp_index()] = real;
    }
    const Instances<Element> h(p.problem, segment, p.vector);
    const int groups = column_count({p.problem.L, p.gated}) / kColumns;
    for (int group = 0; group < groups; ++group) {
      Sums sums;
      project<Precision, CHANNELS_FIRST>(sums, h, p.weights, group, shared.stages);
      if (p.gated) {
        finish<true>(p, segment, slot, sums, group, shared);
      } else {
        finish<false>(p, segment, slot, sums, group, shared);
      }
    }
  }

  ERCN_DEVICE static void write_zeros(const Params& p, int64_t slot) {
    const int64_t L = p.problem.L, heads = p.problem.K * L, biases = (p.gated ? 2 : 1) * L;
    for (int64_t i = arch::thread_index(); p.of.part_heads != nullptr && i < heads; i += kThreads) {
      p.of.part_heads[slot * heads + i] = 0;
    }
    for (int64_t i = arch::thread_index(); p.of.part_biases != nullptr && i < biases; i += kThreads) {
      p.of.part_biases[slot * biases + i] = 0;
    }
  }

  // sums become t and σ, both 0 in rows that are not real, and then dt and dσ.
  template <bool GATED>
  ERCN_DEVICE static void finish(
      const Params& p, const Segment& segment, int64_t slot, Sums& sums, int group, Shared& shared) {
    constexpr int kTiles = GATED ? 4 : 8;
    const int L = p.problem.L, K = p.problem.K, units = padded_units({L, GATED}), branches = GATED ? 2 : 1;
    const int first = group * kColumns / branches;  // unit
    float gate[Sums::kRowTiles][kTiles][4];
#pragma unroll
    for (int m = 0; m < Sums::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = Sums::row(m, i);
          const bool real = shared.real[row / 32] >> row % 32 & 1;
          const Activations on = activations_at<GATED>(sums, p.weights.biases, {L, GATED}, group, m, n, i);
          sums.at[m][n][i] = real ? on.t : 0;
          gate[m][n][i] = real ? on.gate : 0;
        }
      }
    }
    float columns[kTiles][2];
    if (p.of.part_heads != nullptr) {
      for (int k = 0; k < K; ++k) {
        const float* ds = p.of.score_grad + score_offset(p.problem.bags, segment, k, K);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) columns[n][0] = columns[n][1] = 0;
#pragma unroll
        for (int m = 0; m < Sums::kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float d = at_row(ds, segment, Sums::row(m, i));
#pragma unroll
            for (int n = 0; n < kTiles; ++n) columns[n][i % 2] += d * (sums.at[m][n][i] * gate[m][n][i]);
          }
        }
        add_columns<GATED>(columns, p.of.part_heads + (slot * K + k) * L, first, L, shared);
      }
    }

#pragma unroll
    for (int m = 0; m < Sums::kRowTiles; ++m) {
      float dg[kTiles][4] = {};
      for (int k = 0; k < K; ++k) {
        const float* ds = p.of.score_grad + score_offset(p.problem.bags, segment, k, K);
        const float* w = p.weights.heads + int64_t{k} * units;
        const float d[2] = {at_row(ds, segment, Sums::row(m, 0)), at_row(ds, segment, Sums::row(m, 2))};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) dg[n][i] += d[i / 2] * w[unit_at<GATED>(group, n, i)];
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float t = sums.at[m][n][i], s = gate[m][n][i];
          sums.at[m][n][i] = dg[n][i] * s * (1 - t * t);
          if constexpr (GATED) sums.at[m][n + 4][i] = dg[n][i] * t * s * (1 - s);
        }
      }
    }
    if (p.of.part_biases != nullptr) {
      for (int b = 0; b < branches; ++b) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            columns[n][i] = 0;
#pragma unroll
            for (int m = 0; m < Sums::kRowTiles; ++m) {
              columns[n][i] += b == 0 ? sums.at[m][n][i] + sums.at[m][n][i + 2]
                                      : sums.at[m][(n + 4) % 8][i] + sums.at[m][(n + 4) % 8][i + 2];
            }
          }
        }
        add_columns<GATED>(columns, p.of.part_biases + (slot * branches + b) * L, first, L, shared);
      }
    }
    if (p.of.branch_grads != nullptr) store(p, slot, sums, group);
  }

  // ds of a row, 0 beyond the segment.
  ERCN_DEVICE static float at_row(const float* ds, const Segment& segment, int row) {
    return row < segment.rows ? ds[row] : 0;
  }

  // to[first + unit] = the sum of a column over all rows, from the sums over this thread's four.
  template <bool GATED, int TILES>
  ERCN_DEVICE static void add_columns(const float (&columns)[TILES][2], float* to, int first, int L, Shared& shared) {
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = columns[n][i];
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) sum += arch::shuffle_xor(sum, mask);
        if (arch::lane_index() < 4) shared.columns[arch::warp_index() / 2][unit_at<GATED>(0, n, i)] = sum;
      }
    }
    arch::sync_threads();
    const int unit = arch::thread_index();
    if (unit < kColumns / (GATED ? 2 : 1) && first + unit < L) {
      to[first + unit] = shared.columns[0][unit] + shared.columns[1][unit];
    }
    arch::sync_threads();
  }

  ERCN_DEVICE static void store(const Params& p, int64_t slot, const Sums& sums, int group) {
    const int64_t pitch = column_count({p.problem.L, p.gated});
    const float scale = p.of.scale == nullptr ? 1 : p.of.scale[0];
    Element* rows = p.of.branch_grads + (slot - p.of.first_slot) * kSegmentRows * pitch + group * kColumns;
#pragma unroll
    for (int m = 0; m < Sums::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Element* row = rows + Sums::row(m, 2 * half) * pitch;
#pragma unroll
        for (int n = 0; n < Sums::kColumnTiles; ++n) {
          const float x = scale * sums.at[m][n][2 * half], y = scale * sums.at[m][n][2 * half + 1];
          store_pair(row + Sums::column(n, 0), x, y);
        }
      }
    }
  }
};

template <typename Precision, bool CHANNELS_FIRST>
void run(
    const Problem& problem, const Packed<typename Precision::Element>& weights,
    const Branch<typename Precision::Element>& of, bool gated, bool vector, const arch::Stream& stream) {
  using Kernel = PoolBranch<Precision, CHANNELS_FIRST>;
  const arch::Grid grid{static_cast<int>(of.last_slot - of.first_slot)};
  arch::launch<Kernel>({problem, weights, of, gated, vector}, grid, sizeof(typename Kernel::Shared), stream);
}

}  // namespace

template <typename Precision>
void branch(
    const Problem& problem, const Packed<typename Precision::Element>& weights,
    const Branch<typename Precision::Element>& of, bool gated, const arch::Stream& stream) {
  const Layout layout = layout_of(problem, sizeof(typename Precision::Element));
  if (layout.channels_first) {
    run<Precision, true>(problem, weights, of, gated, layout.vector, stream);
  } else {
    run<Precision, false>(problem, weights, of, gated, layout.vector, stream);
  }
}

template void branch<affinity::BFloat16>(
    const Problem&, const Packed<arch::bf16>&, const Branch<arch::bf16>&, bool, const arch::Stream&);
template void branch<affinity::Float16>(
    const Problem&, const Packed<arch::fp16>&, const Branch<arch::fp16>&, bool, const arch::Stream&);
template void branch<affinity::TensorFloat32>(
    const Problem&, const Packed<float>&, const Branch<float>&, bool, const arch::Stream&);
template void branch<affinity::Float32>(
    const Problem&, const Packed<float>&, const Branch<float>&, bool, const arch::Stream&);

}  // namespace ercn::pool
