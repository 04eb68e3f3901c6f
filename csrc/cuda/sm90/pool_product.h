#pragma once
// [V|U] h for one segment of 64 instances and kUnits hidden units at a time: what the pool's forward and the branches
// of its backward share. A block has one warpgroup that loads and kWarpgroups that multiply. Each of those owns a
// segment and its slabs of h; the slabs of [V|U] are shared, so a warpgroup may run ahead of the other by kWeightStages
// slabs and one's activations hide behind the other's products.
#include <arch/hopper.h>
#include <arch/wgmma.h>

#include "pool/problem.h"
#include "sm90/pool_tiles.h"

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
  arch::Barrier rows_full[kWarpgroups][kRowSlabs], rows_empty[kWarpgroups][kRowSlabs];
  arch::Barrier weights_full[kWeightStages], weights_empty[kWeightStages];
};
static_assert(sizeof(ProductShared) <= 227 << 10);

constexpr int kSums = 64 * 2 * kUnits / 128;  // accumulators of a thread, V's before U's
constexpr int kProductThreads = (1 + kWarpgroups) * 128;
constexpr int kLoadRegisters = 24, kMultiplyRegisters = 240;

// Which of a ring's barriers complete their odd phase next, a bit each.
class Phases {
 public:
  ERCN_DEVICE explicit Phases(uint32_t bits) : bits_(bits) {}
  ERCN_DEVICE void wait(arch::Barrier* barriers, int i) {
    arch::barrier_wait(barriers + i, bits_ >> i & 1);
    bits_ ^= 1u << i;
  }

 private:
  uint32_t bits_;
};

// By one thread.
template <typename Shared>
ERCN_DEVICE void initialize_rows(Shared& shared) {
  for (int own = 0; own < kWarpgroups; ++own) {
    for (int i = 0; i < kRowSlabs; ++i) {
      arch::barrier_init(&shared.rows_full[own][i], 1);
      arch::barrier_init(&shared.rows_empty[own][i], 4);  // warps of a warpgroup
    }
  }
}

// By all threads of the block.
ERCN_DEVICE void initialize(ProductShared& shared) {
  if (arch::thread_index() == 0) {
    initialize_rows(shared);
    for (int i = 0; i < kWeightStages; ++i) {
      arch::barrier_init(&shared.weights_full[i], 1);
      arch::barrier_init(&shared.weights_empty[i], 4 * kWarpgroups);
    }
    arch::fence_barrier_init();
  }
  arch::sync_threads();
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
  Phases empty(~0u);
  int stage = 0;
  for (int64_t slot = work.begin(); slot < work.end; slot += work.step()) {
    if (work.is_empty(slot)) continue;
    for (int group = 0; group < groups; ++group) {
      for (int i = 0; i < slabs; ++i) {
        const int d = slab_at(slabs, group, i) * kDepth;
        unsigned char* to = shared.weights[stage];
        empty.wait(shared.weights_empty, stage);
        arch::barrier_arrive_expect(&shared.weights_full[stage], kWeightBytes);
        arch::tma_load(to, maps.v, &shared.weights_full[stage], d, group * kUnits);
        arch::tma_load(to + kWeightBytes / 2, maps.u, &shared.weights_full[stage], d, group * kUnits);
        stage = stage + 1 == kWeightStages ? 0 : stage + 1;
      }
    }
  }
}

// One thread: the slabs of h that warpgroup `own` needs.
template <bool CHANNELS_FIRST, typename Shared>
ERCN_DEVICE void load_rows(
    const arch::TensorMap& h, const Work& work, int slabs, int passes, int own, Shared& shared) {
  Phases empty(~0u);
  for (int64_t slot = work.begin() + own; slot < work.end; slot += work.step()) {
    const Segment segment = work.at(slot);
    if (segment.rows == 0) continue;
    const Box box = box_of(work.bags, segment);
    for (int pass = 0; pass < passes; ++pass) {
      for (int i = 0; i < slabs; ++i) {
        if (!is_loaded(pass, i)) continue;
        const int slab = slab_at(slabs, pass, i), place = slab % kRowSlabs;
        empty.wait(shared.rows_empty[own], place);
        arch::Barrier* full = &shared.rows_full[own][place];
        arch::barrier_arrive_expect(full, kSlabBytes);
        load_slab<CHANNELS_FIRST>(shared.rows[own][place], h, full, box, slab * kDepth);
      }
    }
  }
}

// By the warpgroup that loads: a warp for the weights, and one for the rows of each segment.
template <bool CHANNELS_FIRST>
ERCN_DEVICE void load(
    const ProductMaps& maps, const Work& work, int slabs, int groups, int passes, ProductShared& shared) {
  const int warp = arch::warp_index();
  if (warp > kWarpgroups || arch::lane_index() != 0) return;
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
      : shared_(shared), own_(own), slabs_(slabs), last_pass_(last_pass) {}

  // sums [64 rows, kUnits of V | kUnits of U] as wgmma deals them: sums[4 j + 2 r + c] is row 16 warp + lane / 4 + 8 r
  // and column 8 j + lane % 4 · 2 + c. The pass is the group of hidden units.
  ERCN_DEVICE void product(int pass, float (&sums)[kSums]) {
    constexpr Major kRows = CHANNELS_FIRST ? Major::kMN : Major::kK;
    int stage = 0, place = 0;
    for (int i = 0; i < slabs_; ++i) {
      const int before_stage = stage, before_place = place;
      stage = stage_, place = wait_rows(pass, i);
      wait_weights();
      const arch::Operand rows = operand<kRows>(shared_.rows[own_][place]);
      const arch::Operand weights = operand<Major::kK>(shared_.weights[stage]);
      arch::pin(sums);
      arch::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        arch::wgmma<Element, 2 * kUnits, kRows, Major::kK>(
            sums, arch::advance(rows, k * kStep<kRows>), arch::advance(weights, k * kStep<Major::kK>), i + k > 0);
      }
      arch::wgmma_commit();
      arch::wgmma_wait<1>();
      if (i > 0) release(pass, i - 1, before_stage, before_place);
    }
    arch::wgmma_wait<0>();
    arch::pin(sums);
    release(pass, slabs_ - 1, stage, place);
  }

  // The other warpgroup has a segment, this one has none.
  ERCN_DEVICE void skip(int groups) {
    for (int i = 0; i < groups * slabs_; ++i) {
      const int stage = stage_;
      wait_weights();
      arrive(&shared_.weights_empty[stage]);
    }
  }

  // The place of the i-th slab of a pass, when it is there.
  ERCN_DEVICE int wait_rows(int pass, int i) {
    const int place = slab_at(slabs_, pass, i) % kRowSlabs;
    if (is_loaded(pass, i)) rows_full_.wait(shared_.rows_full[own_], place);
    return place;
  }
  ERCN_DEVICE void release_rows(int pass, int i, int place) {
    if (is_released(slabs_, pass, last_pass_, i)) arrive(&shared_.rows_empty[own_][place]);
  }

 private:
  ERCN_DEVICE void wait_weights() {
    weights_full_.wait(shared_.weights_full, stage_);
    stage_ = stage_ + 1 == kWeightStages ? 0 : stage_ + 1;
  }
  ERCN_DEVICE void release(int pass, int i, int stage, int place) {
    arrive(&shared_.weights_empty[stage]);
    release_rows(pass, i, place);
  }
  // Once for each warp.
  ERCN_DEVICE void arrive(arch::Barrier* barrier) {
    if (arch::lane_index() == 0) arch::barrier_arrive(barrier);
  }

  ProductShared& shared_;
  const int own_, slabs_, last_pass_;
  int stage_ = 0;
  Phases rows_full_{0}, weights_full_{0};
};

}  // namespace ercn::sm90
