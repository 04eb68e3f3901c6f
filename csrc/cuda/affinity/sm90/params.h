#pragma once
// What the Hopper affinity kernels are given.
#include <arch/tensor_map.h>

#include "affinity/sm90/schedule.h"

namespace ercn::sm90::affinity {

struct ForwardParams {
  arch::TensorMap feat, terms;  // [B, N, D] in boxes of [128, 64]; [B, 2 P, padded pixels] in boxes of [2 P, 64]
  Schedule schedule;
  float* direct;    // [slots, P, rows of a group]
  float* mirrored;  // [groups, B, channels, width], pixels beyond the first group; null where A is dense
  int64_t width;
  int channels;
};

struct BackwardParams {
  // [B, N, D] in boxes of [128, 64] and of [columns, 64]; terms of the gradient [B, 2 P, padded pixels] in boxes of
  // [2 P, 64]; pairs [B, 2 P, padded pixels], V' then G', in boxes of [P, 64]
  arch::TensorMap feat_rows, feat_columns, terms, pairs;
  Schedule schedule;
  float* feat_sums;   // [slots, rows, D]
  float* value_sums;  // [slots, P, rows], or null where value needs no gradient
};

}  // namespace ercn::sm90::affinity
