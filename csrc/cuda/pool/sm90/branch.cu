// Backward of the pool's branches on Hopper: [V|U] h again, and from the gradient ds of scores
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
  static constexpr int kThreads = kProductThreads, kMinBlocks = 1;

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    ProductShared& shared = *reinterpret_cast<ProductShared*>(memory);
    const int slabs = arch::divide_up(p.problem.D, kDepth), groups = arch::divide_up(p.problem.L, kUnits);
    const Work work{p.problem.bags, p.first_slot, p.last_slot};
    initialize(shared);
    const int warpgroup = arch::uniform_warp_index() / 4;
    if (warpgroup == 0) {
      arch::lower_registers<kLoadRegisters>();
      load<CHANNELS_FIRST>(p.maps, work, slabs, groups, groups, shared);
    } else {
      arch::raise_registers<kMultiplyRegisters>();
      multiply(p, work, slabs, groups, warpgroup - 1, shared);
    }
  }

  ERCN_DEVICE static void multiply(
      const Params& p, const Work& work, int slabs, int groups, int own, ProductShared& shared) {
    const Place place;
    Multiplier<Element, CHANNELS_FIRST> multiplier(shared, own, slabs, groups - 1);
    for (int64_t pair = work.begin(); pair < work.end; pair += work.step()) {
      if (work.is_empty(pair)) continue;
      const int64_t slot = pair + own;
      const Segment segment = work.at(slot);
      if (segment.rows == 0) {
        multiplier.skip(groups);
        continue;
      }
      const bool real[2] = {
          pool::is_real(p.problem, segment, place.row(0)), pool::is_real(p.problem, segment, place.row(1))};
      float ds[2][kMaxHeads] = {};
#pragma unroll
      for (int k = 0; k < kMaxHeads; ++k) {
        if (k >= p.problem.K) break;
        const float* from = p.score_grad + score_offset(p.problem.bags, segment, k, p.problem.K);
        for (int r = 0; r < 2; ++r) ds[r][k] = real[r] ? p.problem.dropout.scale * from[place.row(r)] : 0;
      }
      for (int group = 0; group < groups; ++group) {
        float sums[kSums];
        multiplier.product(group, sums);
        const int first = group * kUnits, blocks = arch::divide_up(p.problem.L - first, 8);
        if (p.problem.dropout.seed != nullptr) drop(p.problem, segment, first, place, sums);
        pool::with_activation(p.problem.activation, [&](auto activation) {
          branches<decltype(activation)::value>(p, first, blocks, place, real, sums);
        });
        if (p.part_heads != nullptr) {
          if (p.problem.activation == pool::Activation::kGelu) {
            sum_heads<true>(p, slot, first, blocks, place, ds, sums, own, shared);
          } else {
            sum_heads<false>(p, slot, first, blocks, place, ds, sums, own, shared);
          }
        }
        gradients(p, first, blocks, place, ds, sums);
        if (p.part_biases != nullptr) sum_biases(p, slot, first, blocks, place, sums, own, shared);
        if (p.branch_grads != nullptr) store(p, slot, first, blocks, place, sums);
      }
    }
  }

  // sums become what is kept of v, and σ; 0 in rows that are not real.
  template <pool::Activation A>
  ERCN_DEVICE static void branches(
      const Params& p, int first, int blocks, const Place& place, const bool (&real)[2], float (&sums)[kSums]) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      if (j >= blocks) break;
      const Pair v = load_pair<Element>(p.problem.v_bias, first + place.column(j));
      const Pair u = load_pair<Element>(p.problem.u_bias, first + place.column(j));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const pool::Branches on =
            pool::branches<A, false>(sums[4 * j + i] + v.x[i % 2], sums[kGate + 4 * j + i] + u.x[i % 2]);
        sums[4 * j + i] = real[i / 2] ? on.kept : 0;
        sums[kGate + 4 * j + i] = real[i / 2] ? on.gate : 0;
      }
    }
  }

  // They become dt and dσ.
  ERCN_DEVICE static void gradients(
      const Params& p, int first, int blocks, const Place& place, const float (&ds)[2][kMaxHeads],
      float (&sums)[kSums]) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      if (j >= blocks) break;
      float dg[4] = {};
#pragma unroll
      for (int k = 0; k < kMaxHeads; ++k) {
        if (k >= p.problem.K) break;
        const Pair w = load_pair<Element>(p.problem.w, int64_t{k} * p.problem.L + first + place.column(j));
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

  // What is kept is the value, but for GELU. There are no registers for its values beside it, so they are formed again
  // for every head.
  template <bool GELU>
  ERCN_DEVICE static void sum_heads(
      const Params& p, int64_t slot, int first, int blocks, const Place& place, const float (&ds)[2][kMaxHeads],
      float (&sums)[kSums], int own, ProductShared& shared) {
    constexpr pool::Activation A = GELU ? pool::Activation::kGelu : pool::Activation::kTanh;
    [[maybe_unused]] constexpr int kUnroll = GELU ? 1 : kMaxHeads;
#pragma unroll kUnroll
    for (int k = 0; k < kMaxHeads; ++k) {
      if (k >= p.problem.K) break;
      float of[2] = {ds[0][0], ds[1][0]}, columns[2 * kBlocks];
#pragma unroll
      for (int head = 1; head < kMaxHeads; ++head) {
        for (int r = 0; r < 2; ++r) of[r] = head == k ? ds[r][head] : of[r];
      }
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        const int at = i / 2 * 4 + i % 2;
        columns[i] = of[0] * (pool::value_of<A>(sums[at]) * sums[kGate + at]) +
                     of[1] * (pool::value_of<A>(sums[at + 2]) * sums[kGate + at + 2]);
      }
      if constexpr (GELU) arch::pin(sums);
      float* to = p.part_heads + (slot * p.problem.K + k) * p.problem.L + first;
      sum_columns(columns, place, to, 8 * blocks, own, shared);
    }
  }

  ERCN_DEVICE static void sum_biases(
      const Params& p, int64_t slot, int first, int blocks, const Place& place, const float (&sums)[kSums], int own,
      ProductShared& shared) {
#pragma unroll
    for (int branch = 0; branch < 2; ++branch) {
      float columns[2 * kBlocks];
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        const int at = branch * kGate + i / 2 * 4 + i % 2;
        columns[i] = sums[at] + sums[at + 2];
      }
      sum_columns(columns, place, p.part_biases + (slot * 2 + branch) * p.problem.L + first, 8 * blocks, own, shared);
    }
  }

  // Adds each column over the 64 rows: columns[2 j + c] of this thread's two rows, then of a warp's 16, then of four
  // warps.
  ERCN_DEVICE static void sum_columns(
      float (&columns)[2 * kBlocks], const Place& place, float* to, int count, int own, ProductShared& shared) {
    static_assert(2 * kBlocks == 32 && sizeof(shared.scratch[0]) == 2 * kUnits * sizeof(float));
    halve<32>(columns, place.lane, 16);
    halve<16>(columns, place.lane, 8);
    halve<8>(columns, place.lane, 4);
    float* sums = reinterpret_cast<float*>(shared.scratch[own]) + place.warp % 2 * kUnits;
    for (int half = 1; half >= 0; --half) {
      if (place.warp / 2 == half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = sums[place.column(place.lane / 4 * 2 + i / 2) + i % 2];
          sum = half == 1 ? columns[i] : sum + columns[i];
        }
      }
      sync_warpgroup(own);
    }
    const int column = arch::thread_index() % 128;
    const float* all = reinterpret_cast<const float*>(shared.scratch[own]);
    if (column < count) to[column] = all[column] + all[kUnits + column];
    sync_warpgroup(own);
  }

  // Adds this lane's and its partner's x; the lane whose bit is set keeps the upper half, the other the lower one.
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
      const Params& p, int64_t slot, int first, int blocks, const Place& place, const float (&sums)[kSums]) {
    const int L = p.problem.L;
    Element* rows = static_cast<Element*>(p.branch_grads) + (slot - p.first_slot) * kSegmentRows * 2 * L;
    const float scale = p.scale == nullptr ? 1 : *p.scale;
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
        transpose_quad(words, place.lane);
        Element* to = rows + int64_t{place.row(r)} * 2 * L + branch * L + first + 8 * (j + place.lane % 4);
        arch::store_16(to, {{words[0], words[1], words[2], words[3]}});
      }
    }
  }
};

}  // namespace

void pool_branch(const BranchParams& p, const arch::Stream& stream) {
  launch_pairs<PoolBranch>(p, p.last_slot - p.first_slot, sizeof(ProductShared), stream);
}

}  // namespace ercn::sm90
