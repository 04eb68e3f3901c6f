#pragma once
// The mainloop of the forward and of dP: [V|U] h for one segment of 64 instances and kUnits hidden units at a time. A
// block has a producer warpgroup and kConsumers consumer warpgroups. Each consumer owns a segment and its slabs of h.
// They share the slabs of [V|U], so one may run ahead of the other by kWeightStages slabs, and its epilogue hides
// behind the other's products.
#include <arch/ring.h>
#include <arch/wgmma.h>

#include "pool/problem.h"
#include "pool/sm90/tiles.h"

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
struct ProjectionMaps {
  arch::TensorMap h, v, u;
};

struct ProjectionShared {
  unsigned char rows[kConsumers][kRowSlabs][kSlabBytes];
  unsigned char weights[kWeightStages][kWeightBytes];  // kUnits rows of V, then of U
  unsigned char scratch[kConsumers][1024];
  float exchange[kConsumers][4][kMaxHeads];
  Stage row_stages[kConsumers][kRowSlabs], weight_stages[kWeightStages];
};
static_assert(sizeof(ProjectionShared) <= 227 << 10);

constexpr int kSums = 64 * 2 * kUnits / 128;  // accumulators of a thread: those of V
constexpr int kGate = kSums / 2;              // … and from here on those of U
constexpr int kBlockThreads = (1 + kConsumers) * 128;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

template <typename Shared>
ERCN_DEVICE void init_row_stages(Shared& shared) {
  for (auto& stages : shared.row_stages) {
    for (Stage& stage : stages) stage.init(4);  // warps of a consumer
  }
}

ERCN_DEVICE void initialize(ProjectionShared& shared) {
  init_stages([&] {
    init_row_stages(shared);
    for (Stage& stage : shared.weight_stages) stage.init(4 * kConsumers);
  });
}

// Deals pairs of slots to blocks in turn. Each consumer takes one of the two; pairs without any segment are skipped.
struct Scheduler {
  const Bags& bags;
  int64_t first, end;  // slots

  ERCN_DEVICE int64_t begin() const { return first + int64_t{arch::block_index().x} * kConsumers; }
  ERCN_DEVICE int64_t step() const { return int64_t{arch::grid_blocks().x} * kConsumers; }
  ERCN_DEVICE Segment at(int64_t slot) const { return slot < end ? segment_at(bags, slot) : Segment{0, 0, 0, 0}; }
  ERCN_DEVICE bool is_empty(int64_t slot) const {
    for (int i = 0; i < kConsumers; ++i) {
      if (at(slot + i).rows > 0) return false;
    }
    return true;
  }
};

// Where a segment begins in the map of h.
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

// By one thread: the slabs of [V|U] of every group of units, for every pair.
ERCN_DEVICE void produce_weights(
    const ProjectionMaps& maps, const Scheduler& scheduler, int slabs, int groups, ProjectionShared& shared) {
  Ring<kWeightStages> ring{shared.weight_stages};
  for (int64_t slot = scheduler.begin(); slot < scheduler.end; slot += scheduler.step()) {
    if (scheduler.is_empty(slot)) continue;
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

// By one thread: the slabs of h for one consumer.
template <bool CHANNELS_FIRST, typename Shared>
ERCN_DEVICE void produce_rows(
    const arch::TensorMap& h, const Scheduler& scheduler, int slabs, int passes, int consumer, Shared& shared) {
  Phases free{~0u};
  for (int64_t slot = scheduler.begin() + consumer; slot < scheduler.end; slot += scheduler.step()) {
    const Segment segment = scheduler.at(slot);
    if (segment.rows == 0) continue;
    const Box box = box_of(scheduler.bags, segment);
    for (int pass = 0; pass < passes; ++pass) {
#pragma unroll 1
      for (int i = 0; i < slabs; ++i) {
        if (!is_loaded(pass, i)) continue;
        const int slab = slab_at(slabs, pass, i), at = slab % kRowSlabs;
        Stage& stage = shared.row_stages[consumer][at];
        free.wait(stage.free, at);
        arch::barrier_arrive_expect(&stage.full, kSlabBytes);
        load_slab<CHANNELS_FIRST>(shared.rows[consumer][at], h, &stage.full, box, slab * kDepth);
      }
    }
  }
}

// By the producer warpgroup: one warp for the weights, and one for the rows of each consumer.
template <bool CHANNELS_FIRST>
ERCN_DEVICE void produce(
    const ProjectionMaps& maps, const Scheduler& scheduler, int slabs, int groups, int passes,
    ProjectionShared& shared) {
  const int warp = arch::uniform_warp_index();
  if (warp > kConsumers || !arch::elect_one()) return;
  if (warp == 0) {
    produce_weights(maps, scheduler, slabs, groups, shared);
  } else {
    produce_rows<CHANNELS_FIRST>(maps.h, scheduler, slabs, passes, warp - 1, shared);
  }
}

// A consumer's side.
template <typename Element, bool CHANNELS_FIRST>
class ProjectionMainloop {
 public:
  ERCN_DEVICE ProjectionMainloop(ProjectionShared& shared, int consumer, int slabs, int last_pass)
      : shared_(shared), consumer_(consumer), slabs_(slabs), last_pass_(last_pass), weights_{shared.weight_stages} {}

  // sums [64 rows, kUnits of V | kUnits of U] in wgmma's layout: sums[4 j + 2 r + c] is Fragment's row(r) and
  // column(j) + c. The pass is the group of hidden units.
  ERCN_DEVICE void run(int pass, float (&sums)[kSums]) {
    constexpr Major kRows = CHANNELS_FIRST ? Major::kMN : Major::kK;
    Ring<kWeightStages> used = weights_;
    int at = 0;
    for (int i = 0; i < slabs_; ++i) {
      const int before = at;
      at = wait_rows(pass, i);
      weights_.wait_full();
      const arch::Operand rows = operand<kRows>(shared_.rows[consumer_][at]);
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
    release_rows(pass, slabs_ - 1, at);
  }

  // The other consumer has a segment, this one has none.
  ERCN_DEVICE void skip(int groups) {
    for (int i = 0; i < groups * slabs_; ++i) {
      weights_.wait_full();
      arch::sync_warp();  // no product makes lanes wait for each other
      weights_.stage().release();
      weights_.advance();
    }
  }

  // Waits for the i-th slab of a pass and returns its stage.
  ERCN_DEVICE int wait_rows(int pass, int i) {
    const int at = slab_at(slabs_, pass, i) % kRowSlabs;
    if (is_loaded(pass, i)) rows_.wait(shared_.row_stages[consumer_][at].full, at);
    return at;
  }
  ERCN_DEVICE void release_rows(int pass, int i, int at) {
    if (is_released(slabs_, pass, last_pass_, i)) shared_.row_stages[consumer_][at].release();
  }

 private:
  ProjectionShared& shared_;
  const int consumer_, slabs_, last_pass_;
  Ring<kWeightStages> weights_;
  Phases rows_{0};
};

}  // namespace ercn::sm90
