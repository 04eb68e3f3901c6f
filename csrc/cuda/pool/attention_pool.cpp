// Gated attention pooling on CUDA: ercn_native::gated_attention_pool_cuda, attention_scores_cuda, pool_by_scores_cuda
// and …_backward_cuda, which Python calls, and their ercn::* for processes without it (LibTorch stable ABI).
//   s = w · (drop(act(V h + b_V)) ⊙ drop(σ(U h + b_U))) + b_w,   a = softmax(s),   z = Σ a h
// h [B, N, D] or ragged [T, D], the weights and grad_pooled are fp32, bf16 or fp16 of one type, with any strides;
// scores and sums are fp32. This file registers the operators, checks their arguments and chooses the kernels.
#include <string>
#include <tuple>
#include <vector>

#include "library.h"
#include "pool/driver.h"

namespace ercn {
namespace {

using pool::Gradients;
using pool::Inputs;
using pool::MakeKernels;
using pool::Optional;

// The dispatcher passes each operand as an argument; FUNCTION(before…, Inputs, after…) takes them as one. TORCH_BOX
// takes &Flat<FUNCTION>::call, which has a parameter for each.
using OperandTypes = std::tuple<
    const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&, const Tensor&, const Optional&,
    const Optional&, const Optional&, const Optional&, double, std::string>;

template <auto FUNCTION, typename Before, typename Operand, typename After>
struct Spread;
template <auto FUNCTION, typename... Before, typename... Operand, typename... After>
struct Spread<FUNCTION, std::tuple<Before...>, std::tuple<Operand...>, std::tuple<After...>> {
  static auto call(Before... before, Operand... operands, After... after) {
    return FUNCTION(before..., Inputs{operands...}, after...);
  }
};
template <auto FUNCTION, typename Function = decltype(FUNCTION), typename... Before>
struct Flat;
template <auto FUNCTION, typename Result, typename First, typename... Rest, typename... Before>
struct Flat<FUNCTION, Result (*)(First, Rest...), Before...> : Flat<FUNCTION, Result (*)(Rest...), Before..., First> {};
template <auto FUNCTION, typename Result, typename... After, typename... Before>
struct Flat<FUNCTION, Result (*)(Inputs, After...), Before...>
    : Spread<FUNCTION, std::tuple<Before...>, OperandTypes, std::tuple<After...>> {};

void check(const Inputs& in) {
  pool::activation_of(in.activation);
  const Tensor& h = in.h;
  const ScalarType type = h.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "h must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(on_device(h), "h must be on a GPU");
  STD_TORCH_CHECK(h.dim() == (in.ragged() ? 2 : 3), "h must be [B, N, D], or [T, D] with cu_seqlens");
  const int64_t D = h.size(h.dim() - 1), L = in.v_weight.dim() == 2 ? in.v_weight.size(0) : -1;
  const int64_t K = in.w_weight.dim() == 2 ? in.w_weight.size(0) : -1;
  const auto is_here = [&](const Tensor& x) { return on_device(x) && x.get_device_index() == h.get_device_index(); };
  const auto require = [&](const Optional& x, const char* name, std::vector<int64_t> sizes) {
    if (!x) return;
    bool fits = is_here(*x) && x->scalar_type() == type && x->dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = x->size(i) == sizes[i];
    STD_TORCH_CHECK(fits, name, " must be on h's device, of its dtype, and fit D = ", D, ", L = ", L, ", K = ", K);
  };
  require(in.v_weight, "v_weight", {L, D});
  require(in.v_bias, "v_bias", {L});
  require(in.u_weight, "u_weight", {L, D});
  require(in.u_bias, "u_bias", {L});
  require(in.w_weight, "w_weight", {K, L});
  require(in.w_bias, "w_bias", {K});
  if (in.mask) {
    STD_TORCH_CHECK(
        !in.cu_seqlens && is_here(*in.mask) && in.mask->scalar_type() == ScalarType::Bool && in.mask->dim() == 2 &&
            in.mask->size(0) == h.size(0) && in.mask->size(1) == h.size(1),
        "mask must be bool [B, N] on h's device, of dense bags");
  }
  if (in.cu_seqlens) {
    const ScalarType index = in.cu_seqlens->scalar_type();
    STD_TORCH_CHECK(
        is_here(*in.cu_seqlens) && in.cu_seqlens->dim() == 1 && in.cu_seqlens->size(0) > 0 &&
            (index == ScalarType::Int || index == ScalarType::Long),
        "cu_seqlens must be int32 or int64 [B + 1] on h's device");
  }
  STD_TORCH_CHECK(in.dropout_p >= 0 && in.dropout_p <= 1, "dropout_p must be in [0, 1]; got ", in.dropout_p);
  const bool seeded = in.seed && is_here(*in.seed) && in.seed->scalar_type() == ScalarType::Long &&
                      in.seed->dim() == 1 && in.seed->size(0) == 1;
  STD_TORCH_CHECK(seeded || (!in.seed && in.dropout_p == 0), "dropout needs a seed, int64 [1] on h's device");
}

void check_scores(const Tensor& scores, const Inputs& in) {
  const Tensor& h = in.h;
  STD_TORCH_CHECK(
      on_device(scores) && scores.scalar_type() == ScalarType::Float && scores.dim() == h.dim() &&
          scores.size(scores.dim() - 2) == in.w_weight.size(0) &&
          scores.size(scores.dim() - 1) == h.size(h.dim() - 2) && (in.cu_seqlens || scores.size(0) == h.size(0)),
      "scores must be float32 [B, K, N] or [K, T], as the forward's");
}

void check_grad_pooled(const Tensor& grad, const Inputs& in) {
  const Tensor& h = in.h;
  const int64_t bags = in.cu_seqlens ? in.cu_seqlens->size(0) - 1 : h.size(0);
  STD_TORCH_CHECK(
      on_device(grad) && grad.scalar_type() == h.scalar_type() && grad.dim() == 3 && grad.size(0) == bags &&
          grad.size(1) == in.w_weight.size(0) && grad.size(2) == h.size(h.dim() - 1),
      "grad_pooled must have pooled's shape and dtype, on its device");
}

// The kernels named, or, where none are, the sm90 ones where they can run. Raises where those that are named cannot, or
// the name is unknown.
MakeKernels* chosen(const std::string& kernels, const Inputs& in) {
  const bool named = kernels == "sm90" || kernels == "sm90_dense";
  STD_TORCH_CHECK(
      named || kernels.empty() || kernels == "generic", "kernels are generic, sm90 and sm90_dense; got ", kernels);
#if ERCN_SM90
  if (kernels == "generic") return pool::generic_kernels;
  const std::string reason = pool::sm90_obstacle(in);
  STD_TORCH_CHECK(!named || reason.empty(), "the sm90 kernels cannot run gated_attention_pool: ", reason);
  if (reason.empty()) return pool::sm90_kernels;
#else
  STD_TORCH_CHECK(!named, "the sm90 kernels were not built: 9.0a is not in ERCN_CUDA_ARCHS");
#endif
  return pool::generic_kernels;
}

std::tuple<Tensor, Tensor> gated_attention_pool(Inputs in, bool exact, std::string kernels) {
  in.exact = exact;
  check(in);
  return pool::forward(in, chosen(kernels, in));
}

Tensor attention_scores(Inputs in, bool exact, std::string kernels) {
  in.exact = exact;
  check(in);
  return pool::scores(in, chosen(kernels, in));
}

Gradients gated_attention_pool_backward(
    const Optional& grad_pooled, const Optional& grad_scores, Inputs in, const Tensor& scores, int64_t needs,
    bool exact, std::string kernels) {
  in.exact = exact;
  check(in);
  check_scores(scores, in);
  if (grad_pooled) check_grad_pooled(*grad_pooled, in);
  bool matches = !grad_scores || (on_device(*grad_scores) && grad_scores->scalar_type() == ScalarType::Float &&
                                  grad_scores->dim() == scores.dim());
  for (int64_t i = 0; grad_scores && matches && i < scores.dim(); ++i) {
    matches = grad_scores->size(i) == scores.size(i);
  }
  STD_TORCH_CHECK(matches, "grad_scores must have scores' shape and dtype, on its device");
  return pool::backward(grad_pooled, grad_scores, in, scores, needs, chosen(kernels, in));
}

// The operands of pooling by scores: weights without hidden units.
struct ByScores {
  const Tensor v_weight, w_weight;
  const Optional none;
  const Inputs in;

  ByScores(const Tensor& scores, const Tensor& value, const Optional& mask, const Optional& cu_seqlens)
      : v_weight(empty(value, {0, value.dim() > 0 ? value.size(value.dim() - 1) : 0}, value.scalar_type())),
        w_weight(empty(value, {scores.dim() > 1 ? scores.size(scores.dim() - 2) : 0, 0}, value.scalar_type())),
        in{value, v_weight, none, none, none, w_weight, none, mask, cu_seqlens, none, 0, "tanh"} {
    check(in);
    check_scores(scores, in);
  }
};

Tensor pool_by_scores(const Tensor& scores, const Tensor& value, const Optional& mask, const Optional& cu_seqlens) {
  const ByScores operands(scores, value, mask, cu_seqlens);
  return pool::pool_by_scores(scores, operands.in);
}

std::tuple<Tensor, Tensor> pool_by_scores_backward(
    const Tensor& grad_pooled, const Tensor& scores, const Tensor& value, const Optional& mask,
    const Optional& cu_seqlens, bool need_scores, bool need_value) {
  const ByScores operands(scores, value, mask, cu_seqlens);
  check_grad_pooled(grad_pooled, operands.in);
  return pool::pool_by_scores_backward(grad_pooled, scores, operands.in, need_scores, need_value);
}

}  // namespace
}  // namespace ercn

#define ERCN_POOL_OPERANDS                                                                                         \
  "Tensor h, Tensor v_weight, Tensor? v_bias, Tensor? u_weight, Tensor? u_bias, Tensor w_weight, Tensor? w_bias, " \
  "Tensor? mask, Tensor? cu_seqlens, Tensor? seed, float dropout_p, str activation, "

ERCN_REGISTER(STABLE_TORCH_LIBRARY_FRAGMENT, ERCN_LIBRARY, m) {
  m.def("gated_attention_pool_cuda(" ERCN_POOL_OPERANDS "bool exact, str kernels) -> (Tensor pooled, Tensor scores)");
  m.def("attention_scores_cuda(" ERCN_POOL_OPERANDS "bool exact, str kernels) -> Tensor scores");
  m.def(
      "gated_attention_pool_backward_cuda(Tensor? grad_pooled, Tensor? grad_scores, " ERCN_POOL_OPERANDS
      "Tensor scores, int needs, bool exact, str kernels) -> (Tensor grad_h, Tensor grad_v_weight, "
      "Tensor grad_v_bias, Tensor grad_u_weight, Tensor grad_u_bias, Tensor grad_w_weight, Tensor grad_w_bias)");
  m.def("pool_by_scores_cuda(Tensor scores, Tensor value, Tensor? mask, Tensor? cu_seqlens) -> Tensor pooled");
  m.def(
      "pool_by_scores_backward_cuda(Tensor grad_pooled, Tensor scores, Tensor value, Tensor? mask, "
      "Tensor? cu_seqlens, bool need_scores, bool need_value) -> (Tensor grad_scores, Tensor grad_value)");
}

ERCN_REGISTER(STABLE_TORCH_LIBRARY_IMPL, ERCN_LIBRARY, ERCN_DISPATCH_KEY, m) {
  m.impl("gated_attention_pool_cuda", TORCH_BOX(&ercn::Flat<ercn::gated_attention_pool>::call));
  m.impl("gated_attention_pool_backward_cuda", TORCH_BOX(&ercn::Flat<ercn::gated_attention_pool_backward>::call));
  m.impl("attention_scores_cuda", TORCH_BOX(&ercn::Flat<ercn::attention_scores>::call));
  m.impl("pool_by_scores_cuda", TORCH_BOX(&ercn::pool_by_scores));
  m.impl("pool_by_scores_backward_cuda", TORCH_BOX(&ercn::pool_by_scores_backward));
}

#ifndef ERCN_EMULATED
namespace ercn {
namespace {

std::tuple<Tensor, Tensor> gated_attention_pool_dispatched(Inputs in, const std::string& backend) {
  return gated_attention_pool(in, exact_by_default(in.h), kernels_from_environment(backend));
}

Tensor attention_scores_dispatched(Inputs in, const std::string& backend) {
  return attention_scores(in, exact_by_default(in.h), kernels_from_environment(backend));
}

Gradients gated_attention_pool_backward_dispatched(
    const Optional& grad_pooled, const Optional& grad_scores, Inputs in, const Tensor& scores, std::vector<bool> needs,
    const std::string& backend) {
  int64_t wanted = 0;
  for (size_t i = 0; i < needs.size(); ++i) wanted |= int64_t{needs[i]} << i;
  return gated_attention_pool_backward(
      grad_pooled, grad_scores, in, scores, wanted, exact_by_default(in.h), kernels_from_environment(backend));
}

Tensor pool_by_scores_dispatched(
    const Tensor& scores, const Tensor& value, const Optional& mask, const Optional& cu_seqlens,
    const std::string& backend) {
  check_backend(backend, "cuda");
  return pool_by_scores(scores, value, mask, cu_seqlens);
}

std::tuple<Tensor, Tensor> pool_by_scores_backward_dispatched(
    const Tensor& grad_pooled, const Tensor& scores, const Tensor& value, const Optional& mask,
    const Optional& cu_seqlens, std::vector<bool> needs, const std::string& backend) {
  check_backend(backend, "cuda");
  STD_TORCH_CHECK(needs.size() == 2, "needs must have two elements");
  return pool_by_scores_backward(grad_pooled, scores, value, mask, cu_seqlens, needs[0], needs[1]);
}

}  // namespace
}  // namespace ercn

STABLE_TORCH_LIBRARY_IMPL(ercn, CUDA, m) {
  m.impl("gated_attention_pool", TORCH_BOX(&ercn::Flat<ercn::gated_attention_pool_dispatched>::call));
  m.impl("gated_attention_pool_backward", TORCH_BOX(&ercn::Flat<ercn::gated_attention_pool_backward_dispatched>::call));
  m.impl("attention_scores", TORCH_BOX(&ercn::Flat<ercn::attention_scores_dispatched>::call));
  m.impl("pool_by_scores", TORCH_BOX(&ercn::pool_by_scores_dispatched));
  m.impl("pool_by_scores_backward", TORCH_BOX(&ercn::pool_by_scores_backward_dispatched));
}
#endif
