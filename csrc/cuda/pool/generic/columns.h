#pragma once
// The columns of P = [V|U] h as the generic kernels order them, so that a warp has both branches of a unit in its
// registers: gated, 32 units of V and the same 32 of U by turns, which are every second 8 of 64 units, so that a thread
// has all four that share a draw of dropout; else the units of V. Columns are a multiple of kColumns.
#include <arch/host_device.h>

#include <cstdint>

namespace ercn::pool {

constexpr int kColumns = 128;  // of a block

struct Columns {
  int L;
  bool gated;
};

// Units and columns, counting those that pad.
ERCN_HOST_DEVICE constexpr int padded_units(const Columns& of) {
  return of.gated ? arch::round_up(of.L, kColumns / 2) : arch::round_up(of.L, kColumns);
}
ERCN_HOST_DEVICE constexpr int column_count(const Columns& of) { return padded_units(of) * (of.gated ? 2 : 1); }

struct Column {
  int branch, unit;  // 0 of V, 1 of U; units from L on do not exist
};

ERCN_HOST_DEVICE constexpr Column column_at(const Columns& of, int column) {
  if (!of.gated) return {0, column};
  return {column / 32 % 2, column / 128 * 64 + column % 32 / 8 * 16 + column / 64 % 2 * 8 + column % 8};
}

}  // namespace ercn::pool
