// dP on Hopper, and the gradients of w and of the biases: [V|U] h again, and from the gradient ds of scores
//   dt = (wᵀ ds) ⊙ σ ⊙ act'(v),   dσ = (wᵀ ds) ⊙ t ⊙ σ (1 - σ),   Σ ds ⊗ (t ⊙ σ),   Σ dt,   Σ dσ,   t = act(v)
#include <arch/launch.h>

#include "pool/activations.h"
#include "pool/sm90/epilogue.h"
#include "pool/sm90/kernels.h"

namespace ercn::sm90 {
namespace {

constexpr int kBlocks = kUnits / 8;  // of 8 columns, for either branch

template <typename Element, bool CHANNELS_FIRST>
struct PoolBranch {
  using Params = BranchParams;
  static constexpr int kThreads = kBlockThreads, kMinBlocks = 1;

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    ProjectionShared& shared = *reinterpret_cast<ProjectionShared*>(memory);
    const int slabs = arch::divide_up(p.problem.D, kDepth), groups = arch::divide_up(p.problem.L, kUnits);
    const Scheduler scheduler{p.problem.bags, p.dp.first_slot, p.dp.last_slot};
    initialize(shared);
    const int warpgroup = arch::uniform_warp_index() / 4;
    if (warpgroup == 0) {
      arch::lower_registers<kProducerRegisters>();
      produce<CHANNELS_FIRST>(p.maps, scheduler, slabs, groups, groups, shared);
    } else {
      arch::raise_registers<kConsumerRegisters>();
      consume(p, scheduler, slabs, groups, warpgroup - 1, shared);
    }
  }

  ERCN_DEVICE static void consume(
      const Params& p, const Scheduler& scheduler, int slabs, int groups, int consumer, ProjectionShared& shared) {
    const Fragment fragment;
    ProjectionMainloop<Element, CHANNELS_FIRST> mainloop(shared, consumer, slabs, groups - 1);
    for (int64_t pair = scheduler.begin(); pair < scheduler.end; pair += scheduler.step()) {
      if (scheduler.is_empty(pair)) continue;
      const int64_t slot = pair + consumer;
      const Segment segment = scheduler.at(slot);
      if (segment.rows == 0) {
        mainloop.skip(groups);
        continue;
      }
      const bool real[2] = {
          pool::is_real(p.problem.mask, segment, fragment.row(0)),
          pool::is_real(p.problem.mask, segment, fragment.row(1))};
      float ds[2][kMaxHeads] = {};
#pragma unroll
      for (int k = 0; k < kMaxHeads; ++k) {
        if (k >= p.problem.K) break;
        const float* from = p.score_grad + score_offset(p.problem.bags, segment, k, p.problem.K);
        for (int r = 0; r < 2; ++r) ds[r][k] = real[r] ? p.problem.dropout.scale * from[fragment.row(r)] : 0;
      }
      for (int group = 0; group < groups; ++group) {
        float sums[kSums];
        mainloop.run(group, sums);
        const int first = group * kUnits, blocks = arch::divide_up(p.problem.L - first, 8);
        if (p.problem.dropout.seed != nullptr) drop(p.problem, segment, first, fragment, sums);
        pool::with_activation(p.problem.activation, [&](auto activation) {
          branches<decltype(activation)::value>(p, first, blocks, fragment, real, sums);
        });
        if (p.part_heads != nullptr) {
          if (p.problem.activation == pool::Activation::kGelu) {
            sum_heads<true>(p, slot, first, blocks, fragment, ds, sums, consumer, shared);
          } else {
            sum_heads<false>(p, slot, first, blocks, fragment, ds, sums, consumer, shared);
          }
        }
        gradients(p, first, blocks, fragment, ds, sums);
        if (p.part_biases != nullptr) sum_biases(p, slot, first, blocks, fragment, sums, consumer, shared);
        if (p.dp.data != nullptr) store(p, slot, first, blocks, fragment, sums);
      }
    }
  }

  // sums become the kept values and σ; 0 in rows that are not real.
  template <pool::Activation A>
  ERCN_DEVICE static void branches(
      const Params& p, int first, int blocks, const Fragment& fragment, const bool (&real)[2], float (&sums)[kSums]) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      if (j >= blocks) break;
      const Pair v = load_pair<Element>(p.problem.weights.v_bias, first + fragment.column(j));
      const Pair u = load_pair<Element>(p.problem.weights.u_bias, first + fragment.column(j));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const pool::Branches on =
            pool::branches<A, false>(sums[4 * j + i] + v.x[i % 2], sums[kGate + 4 * j + i] + u.x[i % 2]);
        sums[4 * j + i] = real[i / 2] ? on.kept : 0;
        sums[kGate + 4 * j + i] = real[i / 2] ? on.gate : 0;
      }
    }
  }

  // sums become dt and dσ.
  ERCN_DEVICE static void gradients(
      const Params& p, int first, int blocks, const Fragment& fragment, const float (&ds)[2][kMaxHeads],
      float (&sums)[kSums]) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      if (j >= blocks) break;
      float dg[4] = {};
#pragma unroll
      for (int k = 0; k < kMaxHeads; ++k) {
        if (k >= p.problem.K) break;
        const Pair w = load_pair<Element>(p.problem.weights.w, int64_t{k} * p.problem.L + first + fragment.column(j));
        for (int i = 0; i < 4; ++i) dg[i] += ds[i / 2][k] * w.x[i % 2];
      }
      pool::with_activation(p.problem.activation, [&](auto activation) {
        constexpr pool::Activation A = decltype(activation)::value;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float kept = sums[4 * j + i], gate = sums[kGate + 4 * j + i];
          sums[4 * j + i] = dg[i] * gate * pool::slope_of<A>(kept);
          sums[kGate + 4 * j + i] = dg[i] * pool::value_of<A>(kept) * gate * (1 - gate);
        }
      });
    }
  }

  // sums hold act(v), but v for GELU. There are no registers for its values beside v, so each head forms them again.
  template <bool GELU>
  ERCN_DEVICE static void sum_heads(
      const Params& p, int64_t slot, int first, int blocks, const Fragment& fragment, const float (&ds)[2][kMaxHeads],
      float (&sums)[kSums], int consumer, ProjectionShared& shared) {
    constexpr pool::Activation A = GELU ? pool::Activation::kGelu : pool::Activation::kTanh;
    [[maybe_unused]] constexpr int kUnroll = GELU ? 1 : kMaxHeads;
#pragma unroll kUnroll
    for (int k = 0; k < kMaxHeads; ++k) {
      if (k >= p.problem.K) break;
      float ds_k[2] = {ds[0][0], ds[1][0]}, columns[2 * kBlocks];
#pragma unroll
      for (int head = 1; head < kMaxHeads; ++head) {
        for (int r = 0; r < 2; ++r) ds_k[r] = head == k ? ds[r][head] : ds_k[r];
      }
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        const int at = i / 2 * 4 + i % 2;
        columns[i] = ds_k[0] * (pool::value_of<A>(sums[at]) * sums[kGate + at]) +
                     ds_k[1] * (pool::value_of<A>(sums[at + 2]) * sums[kGate + at + 2]);
      }
      if constexpr (GELU) arch::pin(sums);
      float* to = p.part_heads + (slot * p.problem.K + k) * p.problem.L + first;
      sum_columns(columns, fragment, to, 8 * blocks, consumer, shared);
    }
  }

  ERCN_DEVICE static void sum_biases(
      const Params& p, int64_t slot, int first, int blocks, const Fragment& fragment, const float (&sums)[kSums],
      int consumer, ProjectionShared& shared) {
#pragma unroll
    for (int branch = 0; branch < 2; ++branch) {
      float columns[2 * kBlocks];
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        const int at = branch * kGate + i / 2 * 4 + i % 2;
        columns[i] = sums[at] + sums[at + 2];
      }
      float* to = p.part_biases + (slot * 2 + branch) * p.problem.L + first;
      sum_columns(columns, fragment, to, 8 * blocks, consumer, shared);
    }
  }

  // Adds each column over the 64 rows: columns[2 j + c] has this thread's two rows, then a warp's 16, then four warps'.
  ERCN_DEVICE static void sum_columns(
      float (&columns)[2 * kBlocks], const Fragment& fragment, float* to, int count, int consumer,
      ProjectionShared& shared) {
    static_assert(2 * kBlocks == 32 && sizeof(shared.scratch[0]) == 2 * kUnits * sizeof(float));
    halve<32>(columns, fragment.lane, 16);
    halve<16>(columns, fragment.lane, 8);
    halve<8>(columns, fragment.lane, 4);
    float* sums = reinterpret_cast<float*>(shared.scratch[consumer]) + fragment.warp % 2 * kUnits;
    for (int half = 1; half >= 0; --half) {
      if (fragment.warp / 2 == half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = sums[fragment.column(fragment.lane / 4 * 2 + i / 2) + i % 2];
          sum = half == 1 ? columns[i] : sum + columns[i];
        }
      }
      sync_warpgroup(consumer);
    }
    const int column = arch::thread_index() % 128;
    const float* all = reinterpret_cast<const float*>(shared.scratch[consumer]);
    if (column < count) to[column] = all[column] + all[kUnits + column];
    sync_warpgroup(consumer);
  }

  // Adds this lane's and its partner's x; the lane whose bit is set keeps the upper half, its partner the lower one.
  template <int COUNT>
  ERCN_DEVICE static void halve(float (&x)[2 * kBlocks], int lane, int bit) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      const float got = arch::shuffle_xor(upper ? x[i] : x[i + COUNT / 2], bit);
      x[i] = (upper ? x[i + COUNT / 2] : x[i]) + got;
    }
  }

  ERCN_DEVICE static void store(
      const Params& p, int64_t slot, int first, int blocks, const Fragment& fragment, const float (&sums)[kSums]) {
    const int L = p.problem.L;
    Element* rows = static_cast<Element*>(p.dp.data) + (slot - p.dp.first_slot) * kSegmentRows * 2 * L;
    const float scale = p.dp.scale == nullptr ? 1 : *p.dp.scale;
#pragma unroll
    for (int j = 0; j < kBlocks; j += 4) {
      if (j >= blocks) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int branch = i / 2, r = i % 2;
        uint32_t words[4];
        for (int m = 0; m < 4; ++m) {
          const int at = branch * kGate + 4 * (j + m) + 2 * r;
          words[m] = arch::pack<Element>(scale * sums[at], scale * sums[at + 1]);
        }
        transpose_quad(words, fragment.lane);
        Element* to = rows + int64_t{fragment.row(r)} * 2 * L + branch * L + first + 8 * (j + fragment.lane % 4);
        arch::store_16(to, {{words[0], words[1], words[2], words[3]}});
      }
    }
  }
};

}  // namespace

void pool_branch(const BranchParams& p, const arch::Stream& stream) {
  launch_pairs<PoolBranch>(p, p.dp.last_slot - p.dp.first_slot, sizeof(ProjectionShared), stream);
}

}  // namespace ercn::sm90
