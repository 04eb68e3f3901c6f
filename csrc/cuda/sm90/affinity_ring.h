#pragma once
// Stages of shared memory between the loading thread and the consumers: a full barrier that the copies complete, and a
// free barrier at which every consumer warp arrives.
#include <arch/hopper.h>

#include "affinity_tiles.h"

namespace ercn::sm90::affinity {

struct Stage {
  arch::Barrier full, free;

  ERCN_DEVICE void init() {
    arch::barrier_init(&full, 1);
    arch::barrier_init(&free, kConsumers * kWarpgroup / 32);
  }
  // By all lanes of a consumer warp, which have waited for what they read.
  ERCN_DEVICE void release() {
    if (arch::lane_index() == 0) arch::barrier_arrive(&free);
  }
};

// Where a thread is in a ring of N stages. The loading thread may fill every stage once before it waits.
template <int N>
struct Ring {
  Stage* stages;
  int index = 0;
  uint32_t parity = 0;

  ERCN_DEVICE Stage& stage() const { return stages[index]; }
  ERCN_DEVICE void wait_full() const { arch::barrier_wait(&stage().full, parity); }
  ERCN_DEVICE void wait_free() const { arch::barrier_wait(&stage().free, parity ^ 1); }
  ERCN_DEVICE void advance() {
    if (++index == N) {
      index = 0;
      parity ^= 1;
    }
  }
};

// The whole of a block's barriers: of the rows that stay, and of what streams by.
template <int TERM_STAGES, int FEAT_STAGES>
struct Barriers {
  Stage rows, terms[TERM_STAGES], feat[FEAT_STAGES];

  ERCN_DEVICE void init() {
    if (arch::thread_index() == 0) {
      rows.init();
      for (Stage& stage : terms) stage.init();
      for (Stage& stage : feat) stage.init();
      arch::fence_barrier_init();
    }
    arch::sync_threads();
  }
};

}  // namespace ercn::sm90::affinity
