#include "pool/column_sums.h"

#include <arch/convert.h>

namespace ercn::pool {
namespace {

// One block: 32 columns, a warp for every kLanes-th row.
template <typename Element>
struct ColumnSums {
  struct Params {
    const float* parts;
    int64_t rows, stride, columns;
    Element* to;
  };
  static constexpr int kThreads = 512, kMinBlocks = 1, kLanes = kThreads / 32;
  struct Shared {
    float sums[kLanes][32];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = arch::thread_index() / 32, i = arch::thread_index() % 32;
    const int64_t column = int64_t{arch::block_index().x} * 32 + i;
    float sum = 0;
    if (column < p.columns) {
      for (int64_t row = lane; row < p.rows; row += kLanes) sum += p.parts[row * p.stride + column];
    }
    shared.sums[lane][i] = sum;
    for (int half = kLanes / 2; half > 0; half /= 2) {
      arch::sync_threads();
      if (lane < half) shared.sums[lane][i] += shared.sums[lane + half][i];
    }
    if (lane == 0 && column < p.columns) p.to[column] = arch::from_float<Element>(shared.sums[0][i]);
  }
};

template <typename Element>
void sum_as(
    const float* parts, int64_t rows, int64_t stride, int64_t columns, void* to, const arch::Stream& stream) {
  using Kernel = ColumnSums<Element>;
  arch::launch<Kernel>(
      {parts, rows, stride, columns, static_cast<Element*>(to)}, {static_cast<int>(arch::divide_up<int64_t>(columns, 32))},
      sizeof(typename Kernel::Shared), stream);
}

}  // namespace

void column_sums(
    const float* parts, int64_t rows, int64_t stride, int64_t columns, void* to, Type type, const arch::Stream& stream) {
  switch (type) {
    case Type::kFloat: return sum_as<float>(parts, rows, stride, columns, to, stream);
    case Type::kBf16: return sum_as<arch::bf16>(parts, rows, stride, columns, to, stream);
    case Type::kFp16: return sum_as<arch::fp16>(parts, rows, stride, columns, to, stream);
  }
}

}  // namespace ercn::pool
