// The triangle of the Hopper affinity's forward in one block, for tests/cuda/test_emulator_hopper.py.
#include <arch/convert.h>
#include <arch/hopper.h>
#include <arch/wgmma.h>

#ifdef ERCN_INDEX_BY_SHUFFLE  // the kernel asks for its warp's index by a shuffle of all lanes, wherever it asks
#define warp_index uniform_warp_index
#endif
#include "affinity/sm90/forward.h"
#include "affinity/sm90/launch.h"

#include "probe.h"

#pragma GCC visibility push(default)
// feat [pixels, 64], terms [48, pixels]; direct [slots, 24, 256], mirrored [row blocks, channels, pixels - 256]
extern "C" const char* affinity_triangle(
    const void* feat, const void* terms, int pixels, int channels, float* direct, float* mirrored) {
  using namespace ercn::sm90::affinity;
  using Kernel = Forward<ercn::arch::bf16, 64, 24>;
  constexpr int kBlockM = Kernel::Tiles::kBlockM;
  const Kernel::Params params{
      tensor_map<ercn::arch::bf16>(Features{feat, 64 * int64_t{pixels}, 64, 1, pixels, 64}, kTileSide),
      tensor_map<ercn::arch::bf16>(Rows{terms, 1, Kernel::kTerms, pixels}, Kernel::kTerms),
      {1, pixels / kTileSide, 0, ercn::arch::divide_up(pixels, kBlockM), kBlockM / kTileSide, 1},
      direct,
      mirrored,
      mirrored_width(pixels, kBlockM, 0),
      channels};
  return probe(Kernel::kThreads, Kernel::Tiles::kShared, [=](unsigned char* shared) { Kernel::run(params, shared); });
}
#pragma GCC visibility pop
