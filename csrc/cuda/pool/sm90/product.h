#pragma once
// [V|U] h for one segment of 64 instances and kUnits hidden units at a time: what the pool's forward and the branches
// of its backward share. A block has one warpgroup that loads and kWarpgroups that multiply. Each of those owns a
// segment and its slabs of h; the slabs of [V|U] are shared, so a warpgroup may run ahead of the other by kWeightStages
// slabs and one's activations hide behind the other's products.
#include <arch/wgmma.h>

#include "pool/problem.h"
#include "pool/sm90/tiles.h"
#include <arch/ring.h>

namespace ercn::sm90 {

using arch::Major;

// A tile of slabs [64, 64], one after another.
template <Major M>
ERCN_DEVICE arch::Operand operand(const void* tile) {
  return M == Major::kK ? arch::operand_k(tile) : arch::operand_mn(tile, kSlabBytes);
}
// Bytes from 16 terms of the sum to the next.
template <Major M>
constexpr int kStep = M == Major::kK ? 32 : 16 * 128;

// h as [B, N, D], or [1, T, D], in boxes of 64 rows × 64 channels (channels first: 64 channels × 64 rows); V and U
// [L, D] in boxes of kUnits rows × 64 channels. What lies outside reads as 0.
struct ProductMaps {
  arch::TensorMap h, v, u;
};

struct ProductShared {
  unsigned char rows[kWarpgroups][kRowSlabs][kSlabBytes];
  unsigned char weights[kWeightStages][kWeightBytes];  // kUnits rows of V, then of U
  unsigned char scratch[kWarpgroups][1024];
  float exchange[kWarpgroups][4][kMaxHeads];
  Stage row_stages[kWarpgroups][kRowSlabs], weight_stages[kWeightStages];
};
static_assert(sizeof(ProductShared) <= 227 << 10);

constexpr int kSums = 64 * 2 * kUnits / 128;  // accumulators of a thread, V's before
constexpr int kGate = kSums / 2;              // U's
constexpr int kProductThreads = (1 + kWarpgroups) * 128;
constexpr int kLoadRegisters = 24, kMultiplyRegisters = 240;

template <typename Shared>
ERCN_DEVICE void init_rows(Shared& shared) {
  for (auto& own : shared.row_stages) {
    for (Stage& stage : own) stage.init(4);  // warps of a warpgroup
  }
}

ERCN_DEVICE void initialize(ProductShared& shared) {
  init_stages([&] {
    init_rows(shared);
    for (Stage& stage : shared.weight_stages) stage.init(4 * kWarpgroups);
  });
}

// Pairs of slots are dealt to blocks in turn. Each warpgroup takes one of the two; pairs without any segment are passed
// over.
struct Work {
  const Bags& bags;
  int64_t first, end;  // slots

  ERCN_DEVICE int64_t begin() const { return first + int64_t{arch::block_index().x} * kWarpgroups; }
  ERCN_DEVICE int64_t step() const { return int64_t{arch::grid_blocks().x} * kWarpgroups; }
  ERCN_DEVICE Segment at(int64_t slot) const { return slot < end ? segment_at(bags, slot) : Segment{0, 0, 0, 0}; }
  ERCN_DEVICE bool is_empty(int64_t slot) const {
    for (int i = 0; i < kWarpgroups; ++i) {
      if (at(slot + i).rows > 0) return false;
    }
    return true;
  }
};

// Where the map of h has a segment.
struct Box {
  int row, bag;
};
ERCN_DEVICE Box box_of(const Bags& bags, const Segment& segment) {
  if (bags.cu_seqlens != nullptr) return {static_cast<int>(segment.first), 0};
  return {static_cast<int>(segment.in_bag), static_cast<int>(segment.bag)};
}

// 64 rows of h from channel d on.
template <bool CHANNELS_FIRST>
ERCN_DEVICE void load_slab(void* to, const arch::TensorMap& h, arch::Barrier* full, const Box& box, int d) {
  arch::tma_load(to, h, full, CHANNELS_FIRST ? box.row : d, CHANNELS_FIRST ? d : box.row, box.bag);
}

// One thread: slabs of [V|U], `groups` times over its channels for every pair.
ERCN_DEVICE void load_weights(const ProductMaps& maps, const Work& work, int slabs, int groups, ProductShared& shared) {
  Ring<kWeightStages> ring{shared.weight_stages};
  for (int64_t slot = work.begin(); slot < work.end; slot += work.step()) {
    if (work.is_empty(slot)) continue;
    for (int group = 0; group < groups; ++group) {
#pragma unroll 1  // few registers are left to this thread
      for (int i = 0; i < slabs; ++i) {
        const int d = slab_at(slabs, group, i) * kDepth;
        unsigned char* to = shared.weights[ring.index];
        ring.load(kWeightBytes, [&](arch::Barrier* full) {
          arch::tma_load(to, maps.v, full, d, group * kUnits);
          arch::tma_load(to + kWeightBytes / 2, maps.u, full, d, group * kUnits);
        });
      }
    }
  }
}

// One thread: the slabs of h that warpgroup `own` needs.
template <bool CHANNELS_FIRST, typename Shared>
ERCN_DEVICE void load_rows(
    const arch::TensorMap& h, const Work& work, int slabs, int passes, int own, Shared& shared) {
  Phases free{~0u};
  for (int64_t slot = work.begin() + own; slot < work.end; slot += work.step()) {
    const Segment segment = work.at(slot);
    if (segment.rows == 0) continue;
    const Box box = box_of(work.bags, segment);
    for (int pass = 0; pass < passes; ++pass) {
#pragma unroll 1
      for (int i = 0; i < slabs; ++i) {
        if (!is_loaded(pass, i)) continue;
        const int slab = slab_at(slabs, pass, i), place = slab % kRowSlabs;
        Stage& stage = shared.row_stages[own][place];
        free.wait(stage.free, place);
        arch::barrier_arrive_expect(&stage.full, kSlabBytes);
        load_slab<CHANNELS_FIRST>(shared.rows[own][place], h, &stage.full, box, slab * kDepth);
      }
    }
  }
}

// By the warpgroup that loads: a warp for the weights, and one for the rows of each segment.
template <bool CHANNELS_FIRST>
ERCN_DEVICE void load(
    const ProductMaps& maps, const Work& work, int slabs, int groups, int passes, ProductShared& shared) {
  const int warp = arch::uniform_warp_index();
  if (warp > kWarpgroups || !arch::elect_one()) return;
  if (warp == 0) {
    load_weights(maps, work, slabs, groups, shared);
  } else {
    load_rows<CHANNELS_FIRST>(maps.h, work, slabs, passes, warp - 1, shared);
  }
}

// The side of a warpgroup that multiplies.
template <typename Element, bool CHANNELS_FIRST>
class Multiplier {
 public:
  ERCN_DEVICE Multiplier(ProductShared& shared, int own, int slabs, int last_pass)
      : shared_(shared), own_(own), slabs_(slabs), last_pass_(last_pass), weights_{shared.weight_stages} {}

  // sums [64 rows, kUnits of V | kUnits of U] as wgmma deals them: sums[4 j + 2 r + c] is row 16 warp + lane / 4 + 8 r
  // and column 8 j + lane % 4 · 2 + c. The pass is the group of hidden units.
  ERCN_DEVICE void product(int pass, float (&sums)[kSums]) {
    constexpr Major kRows = CHANNELS_FIRST ? Major::kMN : Major::kK;
    Ring<kWeightStages> used = weights_;
    int place = 0;
    for (int i = 0; i < slabs_; ++i) {
      const int before = place;
      place = wait_rows(pass, i);
      weights_.wait_full();
      const arch::Operand rows = operand<kRows>(shared_.rows[own_][place]);
      const arch::Operand weights = operand<Major::kK>(shared_.weights[weights_.index]);
      arch::pin(sums);
      arch::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        arch::wgmma<Element, 2 * kUnits, kRows, Major::kK>(
            sums, arch::advance(rows, k * kStep<kRows>), arch::advance(weights, k * kStep<Major::kK>), i + k > 0);
      }
      arch::wgmma_commit();
      weights_.advance();
      arch::wgmma_wait<1>();
      if (i == 0) continue;
      used.stage().release();
      used.advance();
      release_rows(pass, i - 1, before);
    }
    arch::wgmma_wait<0>();
    arch::pin(sums);
    used.stage().release();
    release_rows(pass, slabs_ - 1, place);
  }

  // The other warpgroup has a segment, this one has none.
  ERCN_DEVICE void skip(int groups) {
    for (int i = 0; i < groups * slabs_; ++i) {
      weights_.wait_full();
      arch::sync_warp();  // no product makes lanes wait for each other
      weights_.stage().release();
      weights_.advance();
    }
  }

  // The place of the i-th slab of a pass, when it is there.
  ERCN_DEVICE int wait_rows(int pass, int i) {
    const int place = slab_at(slabs_, pass, i) % kRowSlabs;
    if (is_loaded(pass, i)) rows_.wait(shared_.row_stages[own_][place].full, place);
    return place;
  }
  ERCN_DEVICE void release_rows(int pass, int i, int place) {
    if (is_released(slabs_, pass, last_pass_, i)) shared_.row_stages[own_][place].release();
  }

 private:
  ProductShared& shared_;
  const int own_, slabs_, last_pass_;
  Ring<kWeightStages> weights_;
  Phases rows_{0};
};

}  // namespace ercn::sm90
