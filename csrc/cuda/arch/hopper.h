// mbarriers, the tensor memory accelerator (TMA), and sm_90's other instructions beside wgmma.
#pragma once

#include <arch/base.h>
#include <arch/tensor_map.h>

namespace ercn::arch {

// True for one lane. By all lanes of a warp.
ERCN_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

// ldmatrix's inverse: r[i] of lane l becomes bytes 4 (l % 4) … of row l / 4 of matrix i; lane 8 i + j gives the address
// of row j of matrix i.
ERCN_DEVICE void stmatrix(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Sets the registers of each thread of the warpgroup, a multiple of 8 up to 256.
template <int REGISTERS>
ERCN_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
ERCN_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// An mbarrier. The first phase has parity 0, the next 1, and so on. A phase ends when `count` threads have arrived and
// all expected bytes have come.
struct alignas(8) Barrier {
  uint64_t state;
};

// By one thread, before fence_barrier_init and a sync_threads.
ERCN_DEVICE void barrier_init(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
ERCN_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

ERCN_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
ERCN_DEVICE void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of this parity; returns at once if the current phase has the other parity.
ERCN_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Makes ordinary stores to shared memory visible to TMA and wgmma: by every writer, before the barrier.
ERCN_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Loads the map's box at element coordinates c0 (innermost), c1, … into shared memory, zeros outside of the tensor, and
// counts the whole box's bytes on the barrier. By one thread. `shared` is a multiple of 1024.
ERCN_DEVICE void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}
ERCN_DEVICE void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

}  // namespace ercn::arch
