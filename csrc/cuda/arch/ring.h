#pragma once
// Stages of shared memory between a loading thread and the warps that read them: a full barrier that the copies
// complete, and a free barrier at which every such warp arrives.
#include <arch/hopper.h>

namespace ercn::sm90 {

struct Stage {
  arch::Barrier full, free;

  ERCN_DEVICE void init(int warps) {
    arch::barrier_init(&full, 1);
    arch::barrier_init(&free, warps);
  }
  // By all lanes of a warp, which have met since they waited for what they read.
  ERCN_DEVICE void release() {
    if (arch::lane_index() == 0) arch::barrier_arrive(&free);
  }
};

// By all threads of a block, before any uses a stage: init() by one of them.
template <typename Init>
ERCN_DEVICE void init_stages(const Init& init) {
  if (arch::thread_index() == 0) {
    init();
    arch::fence_barrier_init();
  }
  arch::sync_threads();
}

// Where a thread is in a ring of N stages. The loading thread may fill every stage once before it waits.
template <int N>
struct Ring {
  Stage* stages;
  int index = 0;
  uint32_t parity = 0;

  ERCN_DEVICE Stage& stage() const { return stages[index]; }
  ERCN_DEVICE void wait_full() const { arch::barrier_wait(&stage().full, parity); }
  ERCN_DEVICE void advance() {
    if (++index == N) {
      index = 0;
      parity ^= 1;
    }
  }
  // By the loading thread, when the stage is free: load(its barrier) starts copies of `bytes` in all.
  template <typename Load>
  ERCN_DEVICE void load(int bytes, const Load& load) {
    arch::barrier_wait(&stage().free, parity ^ 1);
    arch::barrier_arrive_expect(&stage().full, bytes);
    load(&stage().full);
    advance();
  }
};

// For stages that are met in another order: which of their barriers end an odd phase next, a bit each; ~0 for free
// ones.
struct Phases {
  uint32_t odd;

  ERCN_DEVICE void wait(arch::Barrier& barrier, int i) {
    arch::barrier_wait(&barrier, odd >> i & 1);
    odd ^= 1u << i;
  }
};

}  // namespace ercn::sm90
