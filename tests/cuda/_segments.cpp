// csrc/cuda/pool/segments.h for ctypes.
#include "pool/segments.h"

using namespace ercn;

extern "C" {

int64_t slots(Bags bags) { return slot_count(bags); }

// Of slots first ≤ slot < last: bag, first row, row in the bag, rows.
void segments(Bags bags, int64_t first, int64_t last, int64_t (*to)[4]) {
  for (int64_t slot = first; slot < last; ++slot) {
    const Segment s = segment_at(bags, slot);
    int64_t* row = to[slot - first];
    row[0] = s.bag, row[1] = s.first, row[2] = s.in_bag, row[3] = s.rows;
  }
}

// Of every bag: its first slot and how many of its slots hold a segment.
void slots_of_bags(Bags bags, int64_t (*to)[2]) {
  for (int64_t bag = 0; bag < bags.count; ++bag) {
    to[bag][0] = first_slot(bags, bag), to[bag][1] = bag_segments(bags, bag);
  }
}

int64_t score(Bags bags, int64_t slot, int64_t k, int64_t heads) {
  return score_offset(bags, segment_at(bags, slot), k, heads);
}

int64_t row(Bags bags, int64_t slot, int64_t stride_b, int64_t stride_n) {
  return row_offset(bags, segment_at(bags, slot), stride_b, stride_n);
}

int64_t chunk(int64_t bytes, int64_t cache_bytes) { return chunk_slots(bytes, cache_bytes); }

void split(int64_t count, int64_t splits, int64_t split, int64_t* to) {
  const Range range = split_range(count, splits, split);
  to[0] = range.begin, to[1] = range.end;
}
}
