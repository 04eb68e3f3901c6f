// csrc/cuda/sm90/pool_tiles.h for ctypes.
#include "sm90/pool_tiles.h"

using namespace ercn;
using namespace ercn::sm90;

extern "C" {

int slab(int slabs, int pass, int i) { return slab_at(slabs, pass, i); }
bool loaded(int pass, int i) { return is_loaded(pass, i); }
bool released(int slabs, int pass, int last_pass, int i) { return is_released(slabs, pass, last_pass, i); }
int row_slabs() { return kRowSlabs; }

void shares(bool need_v, bool need_u, int L, int D, int64_t slots, int multiprocessors, int* to) {
  const WeightShares shares = weight_shares(need_v, need_u, L, D, slots, multiprocessors);
  to[0] = shares.first_unit, to[1] = shares.units, to[2] = shares.blocks, to[3] = shares.splits;
}
}
