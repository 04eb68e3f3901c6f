// csrc/cuda/affinity/generic/tiles.h for test_affinity_generic.py.
#include "affinity/generic/tiles.h"

using namespace ercn::affinity;

extern "C" {
void slabs_of(int64_t tiles, int64_t blocks, int64_t wanted, int64_t* out) {
  const Slabs cut = slabs(tiles, blocks, wanted);
  out[0] = cut.count, out[1] = cut.tiles;
}
void forward_memory(int chunks, int limit, int64_t* out) {
  const ForwardShared shared = forward_shared(chunks, limit);
  out[0] = shared.resident, out[1] = shared.term_tiles, out[2] = shared.bytes;
}
int backward_memory(int chunks) { return backward_shared(chunks); }
int most_chunks(int limit) { return backward_chunks(limit); }
int chunks_for(int64_t dim, int element_bytes) { return chunks_of(dim, element_bytes); }
}
