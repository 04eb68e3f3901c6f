// ReLU affinity on CUDA: checks, and the choice of kernels. Python calls ercn_native::relu_affinity_cuda and
// …_backward_cuda; in a process without it the dispatcher calls ercn::relu_affinity and …_backward.
//   Y = V · A,  A = relu(FᵀF);   dV = G · A;   dF = F · W,  W = 1[FᵀF > 0] ⊙ (VᵀG + GᵀV)
// V, G [B, C, N] and F [B, D, N] in fp32, bf16 or fp16, any strides; Y in fp32.
#include <string>
#include <tuple>

#include "affinity/generic/affinity.h"
#include "affinity/generic/tiles.h"
#include "library.h"
#if ERCN_SM90
#include "affinity/sm90/affinity.h"
#endif

namespace ercn {
namespace {

bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

void check(const Tensor& tensor, const char* name, const Tensor& feat) {
  STD_TORCH_CHECK(feat.dim() == 3, "feat must be [B, D, N], it has ", feat.dim(), " dimensions");
  STD_TORCH_CHECK(
      tensor.dim() == 3 && tensor.size(0) == feat.size(0) && tensor.size(2) == feat.size(2), name,
      " must be [B, C, N] with feat's B and N");
  STD_TORCH_CHECK(on_device(tensor) && on_device(feat), name, " and feat must be on a GPU");
  STD_TORCH_CHECK(tensor.get_device_index() == feat.get_device_index(), name, " and feat must be on the same GPU");
  STD_TORCH_CHECK(
      is_supported(tensor.scalar_type()) && is_supported(feat.scalar_type()), name,
      " and feat must be float32, bfloat16 or float16");
}

// Whether the Hopper kernels run: by name, or where no kernels are named and they can. Raises where they are named and
// cannot run, and on an unknown name.
bool use_sm90(const std::string& kernels, const Tensor& value, const Tensor& feat) {
  const bool named = kernels == "sm90" || kernels == "sm90_dense";
  STD_TORCH_CHECK(
      named || kernels.empty() || kernels == "generic", "kernels are generic, sm90 and sm90_dense; got ", kernels);
#if ERCN_SM90
  if (kernels == "generic") return false;
  const std::string reason = sm90::cannot_relu_affinity(value, feat);
  STD_TORCH_CHECK(!named || reason.empty(), "the sm90 kernels cannot run relu_affinity: ", reason);
  return reason.empty();
#else
  STD_TORCH_CHECK(!named, "the sm90 kernels were not built: 9.0a is not in ERCN_CUDA_ARCHS");
  return false;
#endif
}

Tensor relu_affinity(const Tensor& value, const Tensor& feat, bool exact, std::string kernels) {
  check(value, "value", feat);
#if ERCN_SM90
  if (use_sm90(kernels, value, feat)) return sm90::relu_affinity(value, feat, kernels != "sm90_dense");
#else
  use_sm90(kernels, value, feat);
#endif
  return affinity::forward(value, feat, exact);
}

std::tuple<Tensor, Tensor> relu_affinity_backward(
    const Tensor& grad_out, const Tensor& value, const Tensor& feat, bool need_value, bool exact, std::string kernels) {
  check(grad_out, "grad_out", feat);
  check(value, "value", feat);
  STD_TORCH_CHECK(grad_out.size(1) == value.size(1), "grad_out must have value's shape");
#if ERCN_SM90
  if (use_sm90(kernels, value, feat)) return sm90::relu_affinity_backward(grad_out, value, feat, need_value);
#else
  use_sm90(kernels, value, feat);
#endif
  return affinity::backward(grad_out, value, feat, need_value, exact);
}

// The most features of one dtype in the generic backward with `shared` bytes of shared memory a block.
int64_t most_features(int64_t element_bytes, int64_t shared) {
  return affinity::most_backward_slabs(static_cast<int>(shared)) *
         affinity::slab_channels(static_cast<int>(element_bytes));
}

}  // namespace
}  // namespace ercn

ERCN_REGISTER(STABLE_TORCH_LIBRARY_FRAGMENT, ERCN_LIBRARY, m) {
  m.def("relu_affinity_cuda(Tensor value, Tensor feat, bool exact, str kernels) -> Tensor");
  m.def(
      "relu_affinity_backward_cuda(Tensor grad_out, Tensor value, Tensor feat, bool need_value, bool exact, "
      "str kernels) -> (Tensor grad_value, Tensor grad_feat)");
  m.def("relu_affinity_most_features(int element_bytes, int shared) -> int");
}

ERCN_REGISTER(STABLE_TORCH_LIBRARY_IMPL, ERCN_LIBRARY, ERCN_DISPATCH_KEY, m) {
  m.impl("relu_affinity_cuda", TORCH_BOX(&ercn::relu_affinity));
  m.impl("relu_affinity_backward_cuda", TORCH_BOX(&ercn::relu_affinity_backward));
}

ERCN_REGISTER(STABLE_TORCH_LIBRARY_IMPL, ERCN_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("relu_affinity_most_features", TORCH_BOX(&ercn::most_features));
}

#ifndef ERCN_EMULATED
namespace ercn {
namespace {

Tensor relu_affinity_dispatched(const Tensor& value, const Tensor& feat, const std::string& backend) {
  return relu_affinity(value, feat, exact_by_default(feat), kernels_from_environment(backend));
}

std::tuple<Tensor, Tensor> relu_affinity_backward_dispatched(
    const Tensor& grad_out, const Tensor& value, const Tensor& feat, bool need_value, const std::string& backend) {
  return relu_affinity_backward(
      grad_out, value, feat, need_value, exact_by_default(feat), kernels_from_environment(backend));
}

}  // namespace
}  // namespace ercn

STABLE_TORCH_LIBRARY_IMPL(ercn, CUDA, m) {
  m.impl("relu_affinity", TORCH_BOX(&ercn::relu_affinity_dispatched));
  m.impl("relu_affinity_backward", TORCH_BOX(&ercn::relu_affinity_backward_dispatched));
}
#endif
