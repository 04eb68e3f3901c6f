// Operators that allocate as those of csrc do and leave the memory unwritten, for test_uninitialised.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>

namespace {

using torch::stable::Tensor;

Tensor output(const Tensor& like) { return torch::stable::new_empty(like, {1000}); }

// Returns what uninitialised memory from malloc holds.
Tensor scratch(const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {1000});
  float* memory = static_cast<float*>(std::aligned_alloc(64, 64 * 1024));
  for (int i = 0; i < 1000; ++i) out.mutable_data_ptr<float>()[i] = memory[i];
  std::free(memory);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ercn_native, m) {
  m.def("unwritten_output(Tensor like) -> Tensor");
  m.def("unwritten_scratch(Tensor like) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ercn_native, CompositeExplicitAutograd, m) {
  m.impl("unwritten_output", TORCH_BOX(&output));
  m.impl("unwritten_scratch", TORCH_BOX(&scratch));
}
