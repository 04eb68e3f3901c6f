// Gated attention pooling on the CPU: ercn::gated_attention_pool and …_backward, attention_scores, pool_by_scores and
// …_backward (LibTorch stable ABI).
//   s = w · (drop(act(V h + b_V)) ⊙ drop(σ(U h + b_U))) + b_w,  a = softmax(s),  z = Σ a h
// The kernels take h, the weights and grad_pooled in fp32, fp64 or bf16 of one type, or h in bf16 beside fp32, with any
// strides; other types are converted first. Sums, scores and the kernels' gradients of the weights are fp32 (fp64 for
// fp64).
#include <torch/csrc/stable/library.h>

#include "../../backend.h"
#include "driver.h"
#include "inputs.h"

namespace ercn {
namespace {

// Calls run(kernel) with the kernel for these types of instances and of weights.
template <typename F>
auto with_kernel(const Tensor& h, const Tensor& weight, const F& run) {
  const Kernels& k = kernels(isa());
  switch (h.scalar_type()) {
    case ScalarType::Double: return run(k.pool_double);
    case ScalarType::Float: return run(k.pool_float);
    default: return weight.scalar_type() == ScalarType::Float ? run(k.pool_mixed) : run(k.pool_bf16);
  }
}

// The operators with a hidden layer. In: the types of PoolInputs' members.
template <typename... In>
struct Operators {
  static std::tuple<Tensor, Tensor> gated_attention_pool(const In&... in, const std::string& backend) {
    check_backend(backend, "cpu");
    PoolInputs x{in...};
    const ScalarType type = x.promoted();
    x.convert();
    check(x);
    const Tensor pooled =
        torch::stable::new_empty(x.h, {x.bags().bags(), x.heads(), x.bags().dim()}, x.v_weight.scalar_type());
    const Tensor scores = with_kernel(x.h, x.v_weight, [&](const auto& kernel) { return forward(kernel, x, &pooled); });
    return {converted(pooled, type), scores};
  }

  static Tensor attention_scores(const In&... in, const std::string& backend) {
    check_backend(backend, "cpu");
    PoolInputs x{in...};
    x.convert();
    check(x);
    return with_kernel(x.h, x.v_weight, [&](const auto& kernel) { return forward(kernel, x, nullptr); });
  }

  static Gradients gated_attention_pool_backward(
      Optional grad_pooled, Optional grad_scores, const In&... in, Tensor scores, std::vector<bool> needs,
      const std::string& backend) {
    check_backend(backend, "cpu");
    const PoolInputs given{in...};
    PoolInputs x = given;
    x.convert();
    if (grad_pooled) grad_pooled = converted(*grad_pooled, x.v_weight.scalar_type());
    if (grad_scores) grad_scores = converted(*grad_scores, scores.scalar_type());
    scores = torch::stable::contiguous(scores);
    check(x);
    check_scores(x.bags(), scores, x.heads());
    if (grad_pooled) check_grad_pooled(x.bags(), *grad_pooled, x.heads(), x.v_weight.scalar_type());
    if (grad_scores) check_grad_scores(*grad_scores, scores);
    const auto [h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias] =
        with_kernel(x.h, x.v_weight, [&](const auto& kernel) {
          return backward(kernel, x, grad_pooled, grad_scores, scores, needs);
        });
    const auto as = [](const Tensor& grad, const Optional& input) {
      return input ? converted(grad, input->scalar_type()) : grad;
    };
    return {as(h, given.h),           as(v_weight, given.v_weight),
            as(v_bias, given.v_bias), as(u_weight, given.u_weight),
            as(u_bias, given.u_bias), as(w_weight, given.w_weight),
            as(w_bias, given.w_bias)};
  }
};
using PoolOperators = Operators<
    Tensor, Tensor, Optional, Optional, Optional, Tensor, Optional, Optional, Optional, Optional, double, std::string>;

Tensor pool_by_scores(
    const Tensor& scores, const Tensor& value, const Optional& mask, const Optional& cu_seqlens,
    const std::string& backend) {
  check_backend(backend, "cpu");
  const ScalarType sums = type_of_sums(scores, value);
  const Tensor s = torch::stable::contiguous(converted(scores, sums)), v = accepted(value, sums);
  const BagInputs in{v, mask, cu_seqlens};
  check(in);
  const int64_t heads = s.size(cu_seqlens ? 0 : 1);
  check_scores(in, s, heads);
  const Tensor pooled = torch::stable::new_empty(v, {in.bags(), heads, in.dim()});
  with_kernel(v, v, [&](const auto& kernel) { pool(kernel, in, s, pooled); });
  return converted(pooled, value.scalar_type());
}

std::tuple<Tensor, Tensor> pool_by_scores_backward(
    const Tensor& grad_pooled, const Tensor& scores, const Tensor& value, const Optional& mask,
    const Optional& cu_seqlens, std::vector<bool> needs, const std::string& backend) {
  check_backend(backend, "cpu");
  STD_TORCH_CHECK(needs.size() == 2, "needs must have two elements");
  const ScalarType sums = type_of_sums(scores, value);
  const Tensor v = accepted(value, sums), g = converted(grad_pooled, v.scalar_type());
  const Tensor s = torch::stable::contiguous(converted(scores, sums));
  const BagInputs in{v, mask, cu_seqlens};
  check(in);
  const int64_t heads = s.size(cu_seqlens ? 0 : 1);
  check_scores(in, s, heads);
  check_grad_pooled(in, g, heads, v.scalar_type());
  const auto [grad_scores, grad_value] =
      with_kernel(v, v, [&](const auto& kernel) { return pool_backward(kernel, in, g, s, needs[0], needs[1]); });
  return {converted(grad_scores, scores.scalar_type()), converted(grad_value, value.scalar_type())};
}

}  // namespace
}  // namespace ercn

STABLE_TORCH_LIBRARY_IMPL(ercn, CPU, m) {
  m.impl("gated_attention_pool", TORCH_BOX(&ercn::PoolOperators::gated_attention_pool));
  m.impl("gated_attention_pool_backward", TORCH_BOX(&ercn::PoolOperators::gated_attention_pool_backward));
  m.impl("attention_scores", TORCH_BOX(&ercn::PoolOperators::attention_scores));
  m.impl("pool_by_scores", TORCH_BOX(&ercn::pool_by_scores));
  m.impl("pool_by_scores_backward", TORCH_BOX(&ercn::pool_by_scores_backward));
}
