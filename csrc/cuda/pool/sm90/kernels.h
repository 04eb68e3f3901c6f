#pragma once
// The launchers of the Hopper kernels, and their arguments: those of pool/problem.h, and tensor maps.
#include <arch/launch.h>

#include <algorithm>

#include "pool/sm90/mainloop.h"

namespace ercn::sm90 {

struct ForwardParams : pool::ForwardParams {
  ProjectionMaps maps;
};

struct DotsParams : pool::DotsParams {
  arch::TensorMap h_map;
};

// dP is [64 rows of each slot, dt of L | dσ of L].
struct BranchParams : pool::BranchParams {
  ProjectionMaps maps;
};

// dP, V and U [L, D] in boxes of 64 × 64
struct RowGradientParams : pool::RowGradientParams {
  arch::TensorMap dp_map, v_map, u_map;
};

struct WeightGradientParams : pool::WeightGradientParams {
  arch::TensorMap dp_map, h_map;
};

void pool_forward(const ForwardParams& p, const arch::Stream& stream);
void pool_dots(const DotsParams& p, const arch::Stream& stream);
void pool_branch(const BranchParams& p, const arch::Stream& stream);
void pool_row_gradient(const RowGradientParams& p, const arch::Stream& stream);
void pool_weight_gradient(const WeightGradientParams& p, const arch::Stream& stream);

inline bool is_channels_first(const pool::Problem& p) { return p.h.stride_d != 1; }

// Starts Kernel<Element, CHANNELS_FIRST> as the problem has it, in `blocks` blocks.
template <template <typename, bool> class Kernel, typename Params>
void launch(const Params& p, int64_t blocks, int shared_bytes, const arch::Stream& stream) {
  const arch::Grid grid{static_cast<int>(blocks)};
  with_half(p.problem.type, [&](auto element) {
    using Element = decltype(element);
    is_channels_first(p.problem) ? arch::launch<Kernel<Element, true>>(p, grid, shared_bytes, stream)
                                 : arch::launch<Kernel<Element, false>>(p, grid, shared_bytes, stream);
  });
}

// The same in a block for every multiprocessor, or as many as there are pairs of slots.
template <template <typename, bool> class Kernel, typename Params>
void launch_pairs(const Params& p, int64_t slots, int shared_bytes, const arch::Stream& stream) {
  const int64_t pairs = arch::divide_up<int64_t>(slots, kConsumers);
  launch<Kernel>(p, std::min<int64_t>(pairs, stream.multiprocessors()), shared_bytes, stream);
}

}  // namespace ercn::sm90
