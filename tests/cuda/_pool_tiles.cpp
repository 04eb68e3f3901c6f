// csrc/cuda/pool/sm90/tiles.h, pool/generic/tiles.h and pool/dropout.h for ctypes.
#include "pool/dropout.h"
#include "pool/generic/tiles.h"
#include "pool/sm90/tiles.h"

using namespace ercn;
using namespace ercn::sm90;

extern "C" {

int slab(int slabs, int pass, int i) { return slab_at(slabs, pass, i); }
bool loaded(int pass, int i) { return is_loaded(pass, i); }
bool released(int slabs, int pass, int last_pass, int i) { return is_released(slabs, pass, last_pass, i); }
int row_slabs() { return kRowSlabs; }

void tiling(bool need_v, bool need_u, int L, int D, int64_t slots, int multiprocessors, int* to) {
  const WeightTiling made = weight_tiling(need_v, need_u, L, D, slots, multiprocessors);
  to[0] = made.first_unit, to[1] = made.units, to[2] = made.tiles, to[3] = made.splits;
}

// Branch and unit of a column.
void column(int L, bool gated, int column, int* to) {
  const pool::Column at = pool::column_at({L, gated}, column);
  to[0] = at.branch, to[1] = at.unit;
}
int columns(int L, bool gated) { return pool::column_count({L, gated}); }

void words(uint64_t seed, uint64_t instance, int unit, uint32_t* to) {
  const pool::Words words = pool::random_words(seed, instance, pool::counter_of(unit));
  for (int i = 0; i < 4; ++i) to[i] = words.at[i];
}
int word(int unit) { return pool::word_of(unit); }
bool dropped(bool gated, uint32_t word, uint32_t limit) {
  return gated ? pool::is_dropped<true>(word, limit) : pool::is_dropped<false>(word, limit);
}
}
