#pragma once
// Tile sizes of the generic kernels, and the order of the columns of P = [V|U] h: a warp has both branches of a unit in
// its registers. Gated, 32 units of V and the same 32 of U take turns; these are every second 8 of 64 units, so that a
// thread has all four that share a draw of dropout. Else the columns are the units of V. They are padded to kColumns.
#include <arch/host_device.h>

#include <cstdint>

namespace ercn::pool {

constexpr int kColumns = 128;                                   // of P, in a block of the forward and of dP
constexpr int kGradientColumns = 64, kGradientChannels = 128;  // of dP and of h, in a block of a product with dP

struct Columns {
  int L;
  bool gated;
};

// Units and columns, padding included.
ERCN_HOST_DEVICE constexpr int padded_units(const Columns& columns) {
  return arch::round_up(columns.L, columns.gated ? kColumns / 2 : kColumns);
}
ERCN_HOST_DEVICE constexpr int column_count(const Columns& columns) {
  return padded_units(columns) * (columns.gated ? 2 : 1);
}

struct Column {
  int branch, unit;  // 0 of V, 1 of U; units from L on do not exist
};

ERCN_HOST_DEVICE constexpr Column column_at(const Columns& columns, int column) {
  if (!columns.gated) return {0, column};
  return {column / 32 % 2, column / 128 * 64 + column % 32 / 8 * 16 + column / 64 % 2 * 8 + column % 8};
}

}  // namespace ercn::pool
