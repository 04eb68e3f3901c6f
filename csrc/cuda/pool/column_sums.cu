#include "pool/column_sums.h"

#include <arch/convert.h>

namespace ercn::pool {
namespace {

// One block: COLUMNS columns, and LANES threads for each that take every LANES-th row.
template <typename Element, int COLUMNS, int LANES>
struct ColumnSums {
  struct Params {
    const float* parts;
    int64_t rows, stride, columns;
    Element* to;
  };
  static constexpr int kThreads = COLUMNS * LANES, kMinBlocks = 1;
  struct Shared {
    float sums[LANES][COLUMNS];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = arch::thread_index() / COLUMNS, i = arch::thread_index() % COLUMNS;
    const int64_t column = int64_t{arch::block_index().x} * COLUMNS + i;
    float sum = 0;
    if (column < p.columns) {
      for (int64_t row = lane; row < p.rows; row += LANES) sum += p.parts[row * p.stride + column];
    }
    shared.sums[lane][i] = sum;
    for (int half = LANES / 2; half > 0; half /= 2) {
      arch::sync_threads();
      if (lane < half) shared.sums[lane][i] += shared.sums[lane + half][i];
    }
    if (lane == 0 && column < p.columns) p.to[column] = arch::from_float<Element>(shared.sums[0][i]);
  }
};

template <typename Kernel>
void launch(const typename Kernel::Params& p, int columns, const arch::Stream& stream) {
  const int64_t blocks = arch::divide_up<int64_t>(p.columns, columns);
  arch::launch<Kernel>(p, {static_cast<int>(blocks)}, sizeof(typename Kernel::Shared), stream);
}

// Shares of weights are few rows of many columns; segments are many rows of few.
template <typename Element>
void sum_as(
    const float* parts, int64_t rows, int64_t stride, int64_t columns, void* to, const arch::Stream& stream) {
  constexpr int kFew = 32;
  const auto with = [&](auto kernel, int across) {
    launch<decltype(kernel)>({parts, rows, stride, columns, static_cast<Element*>(to)}, across, stream);
  };
  rows <= kFew ? with(ColumnSums<Element, 256, 1>(), 256) : with(ColumnSums<Element, 32, 16>(), 32);
}

}  // namespace

void column_sums(
    const float* parts, int64_t rows, int64_t stride, int64_t columns, void* to, Type type,
    const arch::Stream& stream) {
  switch (type) {
    case Type::kFloat: return sum_as<float>(parts, rows, stride, columns, to, stream);
    case Type::kBf16: return sum_as<arch::bf16>(parts, rows, stride, columns, to, stream);
    case Type::kFp16: return sum_as<arch::fp16>(parts, rows, stride, columns, to, stream);
  }
}

}  // namespace ercn::pool
