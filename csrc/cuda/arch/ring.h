// The pipeline of stages in shared memory between a producer thread and the consumer warps: TMA completes a stage's
// full barrier, every consumer warp arrives at its free barrier.
#pragma once

#include <arch/hopper.h>

namespace ercn::sm90 {

struct Stage {
  arch::Barrier full, free;

  ERCN_DEVICE void init(int warps) {
    arch::barrier_init(&full, 1);
    arch::barrier_init(&free, warps);
  }
  // By all lanes of a consumer warp, when all of them have read the stage.
  ERCN_DEVICE void release() {
    if (arch::lane_index() == 0) arch::barrier_arrive(&free);
  }
};

// By all threads of a block, before any of them uses a stage; one calls init().
template <typename Init>
ERCN_DEVICE void init_stages(const Init& init) {
  if (arch::thread_index() == 0) {
    init();
    arch::fence_barrier_init();
  }
  arch::sync_threads();
}

// A thread's position in a ring of N stages. The producer may fill every stage once before it waits.
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
  // By the producer: waits until the stage is free; load(its full barrier) then starts copies of `bytes` in all.
  template <typename Load>
  ERCN_DEVICE void load(int bytes, const Load& load) {
    arch::barrier_wait(&stage().free, parity ^ 1);
    arch::barrier_arrive_expect(&stage().full, bytes);
    load(&stage().full);
    advance();
  }
};

// The parities of stages that are used in another order: a bit for each barrier whose next phase is odd; ~0 for free
// barriers.
struct Phases {
  uint32_t odd;

  ERCN_DEVICE void wait(arch::Barrier& barrier, int i) {
    arch::barrier_wait(&barrier, odd >> i & 1);
    odd ^= 1u << i;
  }
};

}  // namespace ercn::sm90
