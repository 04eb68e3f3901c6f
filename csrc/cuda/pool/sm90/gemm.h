#pragma once
// The mainloop of products with dP, [128, 256] outputs a block: each of two consumer warpgroups has 64 rows of A, and
// both share B. A and B pass through kGemmStages stages of 64 terms of the sum.
#include <arch/wgmma.h>

#include "pool/sm90/mainloop.h"

namespace ercn::sm90 {

constexpr int kGemmStages = 4;
constexpr int kGemmSums = 64 * kGemmColumns / 128;

struct GemmShared {
  struct Tiles {
    unsigned char a[kConsumers][kSlabBytes];
    unsigned char b[kGemmColumns / kDepth][kSlabBytes];
  } tiles[kGemmStages];
  Stage stages[kGemmStages];
};
static_assert(sizeof(GemmShared) <= 227 << 10);

ERCN_DEVICE void initialize(GemmShared& shared) {
  init_stages([&] {
    for (Stage& stage : shared.stages) stage.init(4 * kConsumers);
  });
}

// A consumer's side.
template <typename Element, Major A, Major B>
class GemmMainloop {
 public:
  ERCN_DEVICE GemmMainloop(GemmShared& shared, int consumer)
      : shared_(shared), consumer_(consumer), next_{shared.stages}, used_{shared.stages} {}

  // The next stage's tiles, when they are there.
  ERCN_DEVICE GemmShared::Tiles& wait() {
    next_.wait_full();
    return shared_.tiles[next_.index];
  }
  // sums = A · B of that stage, or sums += A · B; releases the stage before it.
  ERCN_DEVICE void step(float (&sums)[kGemmSums], bool accumulate) {
    const GemmShared::Tiles& tiles = shared_.tiles[next_.index];
    const arch::Operand a = operand<A>(tiles.a[consumer_]), b = operand<B>(tiles.b);
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
    next_.advance();
  }
  // After the last stage of a sum.
  ERCN_DEVICE void finish(float (&sums)[kGemmSums]) {
    arch::wgmma_wait<0>();
    arch::pin(sums);
    release();
  }
  // Releases the next stages without using them.
  ERCN_DEVICE void skip(int stages) {
    for (int i = 0; i < stages; ++i) {
      wait();
      arch::sync_warp();  // no product makes lanes wait for each other
      next_.advance();
      release();
    }
  }

 private:
  // The stage before the next one, if it is held.
  ERCN_DEVICE void release() {
    if (used_.index == next_.index) return;
    used_.stage().release();
    used_.advance();
  }

  GemmShared& shared_;
  const int consumer_;
  Ring<kGemmStages> next_, used_;
};

}  // namespace ercn::sm90
