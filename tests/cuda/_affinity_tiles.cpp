// csrc/cuda/affinity/generic/tiles.h for test_affinity_generic.py.
#include "affinity/generic/tiles.h"

using namespace ercn::affinity;

extern "C" {
void splits_of(int64_t tiles, int64_t blocks, int64_t wanted, int64_t* out) {
  const Splits splits = split_columns(tiles, blocks, wanted);
  out[0] = splits.count, out[1] = splits.tiles;
}
void forward_memory(int slabs, int limit, int64_t* out) {
  const ForwardShared shared = forward_shared(slabs, limit);
  out[0] = shared.resident, out[1] = shared.term_tiles, out[2] = shared.bytes;
}
int backward_memory(int slabs) { return backward_shared(slabs); }
int most_slabs(int limit) { return most_backward_slabs(limit); }
int slabs_for(int64_t dim, int element_bytes) { return slabs_of(dim, element_bytes); }
}
