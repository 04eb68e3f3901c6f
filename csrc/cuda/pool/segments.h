#pragma once
// The segments of bags. The instances of all bags are the rows of one list, bag after bag. A segment is a run of at
// most kSegmentRows rows of ONE bag, counted from the bag's start: its rows share a softmax, and no value of a
// neighbouring bag, NaN included, reaches it.
//
// Every segment has a slot, the index of its partial sums and of its work. A bag's slots are consecutive, and every sum
// over a bag adds them in ascending order. The first one is
//
//   dense   bag · ⌈N / 64⌉              ragged   ⌊start / 64⌋ + bag
//
// which needs neither prefix sums nor the host: since ⌈n / 64⌉ ≤ ⌊(start + n) / 64⌋ - ⌊start / 64⌋ + 1, the slots of a
// bag end before those of the next begin. At most one slot for each ragged bag has no segment.
#include <arch/host_device.h>

#include <cstdint>

namespace ercn {

constexpr int kSegmentRows = 64;

// Dense bags [count, n] (cu_seqlens null), or ragged ones: cu_seqlens [count + 1], int64 where `wide`, else int32.
struct Bags {
  const void* cu_seqlens;
  bool wide;
  int64_t count, n, rows;
};

// `rows` rows, from row `first` of the list and row `in_bag` of the bag on. No segment where rows is 0.
struct Segment {
  int64_t bag, first, in_bag;
  int rows;
};

ERCN_HOST_DEVICE int64_t segments_of(int64_t rows) { return arch::divide_up<int64_t>(rows, kSegmentRows); }

// First row of a bag, or the number of rows for the bag after the last. Inside the list whatever cu_seqlens holds.
ERCN_HOST_DEVICE int64_t bag_start(const Bags& bags, int64_t bag) {
  if (bags.cu_seqlens == nullptr) return bag * bags.n;
  const int64_t start = bags.wide ? static_cast<const int64_t*>(bags.cu_seqlens)[bag]
                                  : static_cast<int64_t>(static_cast<const int32_t*>(bags.cu_seqlens)[bag]);
  return start < 0 ? 0 : start < bags.rows ? start : bags.rows;
}

ERCN_HOST_DEVICE int64_t bag_rows(const Bags& bags, int64_t bag) {
  const int64_t rows = bag_start(bags, bag + 1) - bag_start(bags, bag);
  return rows < 0 ? 0 : rows;
}

ERCN_HOST_DEVICE int64_t first_slot(const Bags& bags, int64_t bag) {
  if (bags.cu_seqlens == nullptr) return bag * segments_of(bags.n);
  return bag_start(bags, bag) / kSegmentRows + bag;
}

// Number of a bag's slots, from first_slot on, that have a segment.
ERCN_HOST_DEVICE int64_t bag_segments(const Bags& bags, int64_t bag) { return segments_of(bag_rows(bags, bag)); }

// Of the whole batch, without reading cu_seqlens.
ERCN_HOST_DEVICE int64_t slot_count(const Bags& bags) {
  if (bags.cu_seqlens == nullptr) return bags.count * segments_of(bags.n);
  return bags.rows / kSegmentRows + bags.count;
}

// The bag whose slots begin last at or before `slot`.
ERCN_HOST_DEVICE int64_t bag_of_slot(const Bags& bags, int64_t slot) {
  if (bags.cu_seqlens == nullptr) return slot / segments_of(bags.n);
  int64_t low = 0, high = bags.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_slot(bags, middle) <= slot ? low : high) = middle;
  }
  return low;
}

ERCN_HOST_DEVICE Segment segment_at(const Bags& bags, int64_t slot) {
  if (slot >= slot_count(bags)) return {0, 0, 0, 0};
  const int64_t bag = bag_of_slot(bags, slot), in_bag = (slot - first_slot(bags, bag)) * kSegmentRows;
  const int64_t left = in_bag < 0 ? 0 : bag_rows(bags, bag) - in_bag;
  const int rows = static_cast<int>(left < 0 ? 0 : left < kSegmentRows ? left : kSegmentRows);
  return {bag, bag_start(bags, bag) + in_bag, in_bag, rows};
}

// Offset of a segment's first row in a tensor [B, N, …] of these strides, or [T, …] with ragged bags.
ERCN_HOST_DEVICE int64_t row_offset(const Bags& bags, const Segment& segment, int64_t stride_b, int64_t stride_n) {
  return bags.cu_seqlens == nullptr ? segment.bag * stride_b + segment.in_bag * stride_n : segment.first * stride_n;
}

// Offset of head k of a segment's first row in scores, [B, K, N] or [K, T]; its rows follow one another.
ERCN_HOST_DEVICE int64_t score_offset(const Bags& bags, const Segment& segment, int64_t k, int64_t heads) {
  if (bags.cu_seqlens != nullptr) return k * bags.rows + segment.first;
  return (segment.bag * heads + k) * bags.n + segment.in_bag;
}

struct Range {
  int64_t begin, end;
};

// Split `split` of `count` things in order; sizes differ by one at most.
ERCN_HOST_DEVICE Range split_range(int64_t count, int64_t splits, int64_t split) {
  const int64_t size = count / splits, longer = count % splits;
  const int64_t begin = split * size + (split < longer ? split : longer);
  return {begin, begin + size + (split < longer ? 1 : 0)};
}

// Slots of a chunk: pairs of slots whose dP, the gradients of the pool's branches of `bytes` each, fill a third of the
// L2 cache, so that they stay there. A chunk has at most 512: tensor cores truncate their fp32 sums, by 2^-25 of a sum
// for every 16 rows (8 in TF32) on average, and 2048 (4096) times that is still small beside a rounding to fp16 (TF32).
ERCN_HOST_DEVICE constexpr int64_t chunk_slots(int64_t bytes, int64_t cache_bytes) {
  const int64_t slots = bytes == 0 ? 512 : cache_bytes / 3 / bytes / 2 * 2;
  return slots < 2 ? 2 : slots < 512 ? slots : 512;
}

// How dPᵀ h is cut: `units` units from first_unit on, of V's L and then U's L, in `tiles` tiles of outputs, and the
// slots in `splits` splits.
struct WeightTiling {
  int first_unit, units, tiles, splits;
};

}  // namespace ercn
