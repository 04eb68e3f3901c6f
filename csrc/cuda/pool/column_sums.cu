#include <arch/convert.h>

#include "pool/steps.h"

namespace ercn::pool {
namespace {

// One block: COLUMNS columns, and LANES threads for each that take every LANES-th row.
template <typename Element, int COLUMNS, int LANES>
struct ColumnSums {
  using Params = ColumnSumsParams;
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
    if (lane > 0 || column >= p.columns) return;
    static_cast<Element*>(p.to)[column] = arch::from_float<Element>(shared.sums[0][i]);
  }
};

}  // namespace

void column_sums(const ColumnSumsParams& p, const arch::Stream& stream) {
  const auto with = [&](auto kernel, int columns) {
    using Kernel = decltype(kernel);
    const int64_t blocks = arch::divide_up<int64_t>(p.columns, columns);
    arch::launch<Kernel>(p, {static_cast<int>(blocks)}, sizeof(typename Kernel::Shared), stream);
  };
  with_element(p.type, [&](auto element) {
    using Element = decltype(element);
    constexpr int kFew = 32;  // shares of weights are few rows of many columns; segments are many rows of few
    p.rows <= kFew ? with(ColumnSums<Element, 256, 1>(), 256) : with(ColumnSums<Element, 32, 16>(), 32);
  });
}

}  // namespace ercn::pool
