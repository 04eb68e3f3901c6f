// Operators for tests beside those of csrc/cuda: the emulator's seed, a band's memory limit, counts of launches.
#include <torch/csrc/stable/library.h>

#include <string>

#include "emulator.h"
#include "library.h"
#include "registry.h"
#include "affinity/sm90/affinity.h"

namespace {

void set_seed(int64_t seed) { ercn::emulator::set_seed(static_cast<uint64_t>(seed)); }

ercn::Tensor relu_affinity_bands(const ercn::Tensor& value, const ercn::Tensor& feat, int64_t mirrored_bytes) {
  return ercn::sm90::relu_affinity(value, feat, true, mirrored_bytes);
}

}  // namespace

// A line for every kernel: its name and its launches.
extern "C" __attribute__((visibility("default"))) const char* ercn_launches() {
  static std::string lines;
  lines.clear();
  for (const ercn::KernelRecord* record : ercn::kernel_records()) {
    lines += record->name + ' ' + std::to_string(record->launches) + '\n';
  }
  return lines.c_str();
}

STABLE_TORCH_LIBRARY_FRAGMENT(ercn_emulated, m) {
  m.def("set_seed(int seed) -> ()");
  m.def("relu_affinity_bands(Tensor value, Tensor feat, int mirrored_bytes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ercn_emulated, CompositeExplicitAutograd, m) { m.impl("set_seed", TORCH_BOX(&set_seed)); }

STABLE_TORCH_LIBRARY_IMPL(ercn_emulated, CPU, m) { m.impl("relu_affinity_bands", TORCH_BOX(&relu_affinity_bands)); }
