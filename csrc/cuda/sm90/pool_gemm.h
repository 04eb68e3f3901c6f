#pragma once
// Products of the pool's backward on Hopper, [128, 256] outputs a block: each of two warpgroups that multiply has 64
// rows of A, both share B. One thread loads. A and B pass through kStages stages of 64 columns (rows) of the sum each.
#include <arch/hopper.h>
#include <arch/wgmma.h>

#include "sm90/pool_product.h"

namespace ercn::sm90 {

constexpr int kGemmStages = 4;
constexpr int kGemmSums = 64 * kGemmColumns / 128;

struct GemmShared {
  struct Stage {
    unsigned char a[kWarpgroups][kSlabBytes];
    unsigned char b[kGemmColumns / kDepth][kSlabBytes];
  } stages[kGemmStages];
  arch::Barrier full[kGemmStages], empty[kGemmStages];
};
static_assert(sizeof(GemmShared) <= 227 << 10);

ERCN_DEVICE void initialize(GemmShared& shared) {
  if (arch::thread_index() == 0) {
    for (int i = 0; i < kGemmStages; ++i) {
      arch::barrier_init(&shared.full[i], 1);
      arch::barrier_init(&shared.empty[i], 4 * kWarpgroups);
    }
    arch::fence_barrier_init();
  }
  arch::sync_threads();
}

// The side that loads: the next stage, when it is empty.
class GemmLoader {
 public:
  ERCN_DEVICE explicit GemmLoader(GemmShared& shared) : shared_(shared) {}

  // load(stage, barrier) starts the copies of all of the stage.
  template <typename Load>
  ERCN_DEVICE void next(const Load& load) {
    empty_.wait(shared_.empty, stage_);
    arch::Barrier* full = &shared_.full[stage_];
    arch::barrier_arrive_expect(full, sizeof(GemmShared::Stage));
    load(shared_.stages[stage_], full);
    stage_ = (stage_ + 1) % kGemmStages;
  }

 private:
  GemmShared& shared_;
  int stage_ = 0;
  Phases empty_{~0u};
};

// The side that multiplies.
template <typename Element, Major A, Major B>
class GemmMultiplier {
 public:
  ERCN_DEVICE GemmMultiplier(GemmShared& shared, int own) : shared_(shared), own_(own) {}

  // The next stage, when it is full.
  ERCN_DEVICE GemmShared::Stage& wait() {
    full_.wait(shared_.full, stage_);
    return shared_.stages[stage_];
  }
  // sums = A · B of that stage, or sums += A · B; the stage before it is given up.
  ERCN_DEVICE void multiply(float (&sums)[kGemmSums], bool accumulate) {
    const GemmShared::Stage& stage = shared_.stages[stage_];
    const arch::Operand a = operand<A>(stage.a[own_]), b = operand<B>(stage.b);
    arch::pin(sums);
    arch::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      arch::wgmma<Element, kGemmColumns, A, B>(
          sums, arch::advance(a, k * kStep<A>), arch::advance(b, k * kStep<B>), accumulate || k > 0);
    }
    arch::wgmma_commit();
    arch::wgmma_wait<1>();
    release();
    held_ = stage_;
    stage_ = (stage_ + 1) % kGemmStages;
  }
  // After the last stage of a sum.
  ERCN_DEVICE void finish(float (&sums)[kGemmSums]) {
    arch::wgmma_wait<0>();
    arch::pin(sums);
    release();
  }
  // Gives up the next stages without using them.
  ERCN_DEVICE void skip(int stages) {
    for (int i = 0; i < stages; ++i) {
      wait();
      held_ = stage_;
      release();
      stage_ = (stage_ + 1) % kGemmStages;
    }
  }

 private:
  ERCN_DEVICE void release() {
    if (held_ >= 0 && arch::lane_index() == 0) arch::barrier_arrive(&shared_.empty[held_]);
    held_ = -1;
  }

  GemmShared& shared_;
  const int own_;
  int stage_ = 0, held_ = -1;
  Phases full_{0};
};

}  // namespace ercn::sm90
