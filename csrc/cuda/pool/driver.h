#pragma once
// The operator's forward and backward as sequences of kernels, and what each architecture gives for them.
#include <memory>

#include "pool/operands.h"

namespace ercn::arch {
class Stream;
}

namespace ercn::pool {

// An architecture's kernels for one problem; all of them run on one stream.
class Kernels {
 public:
  virtual ~Kernels() = default;
  virtual void forward(const ForwardParams& p) const = 0;
  virtual void dots(const DotsParams& p) const = 0;
  virtual void branch(const BranchParams& p) const = 0;
  virtual void row_gradient(const RowGradientParams& p) const = 0;
  virtual void weight_gradient(const WeightGradientParams& p) const = 0;
  // Columns of dP.
  virtual int64_t columns() const = 0;
  virtual WeightTiling weight_tiling(bool need_v, bool need_u, int64_t slots) const = 0;
};

using MakeKernels = std::unique_ptr<Kernels>(const Tensor& h, const Problem& p, const arch::Stream& stream);

// generic: any GPU from compute capability 8.0 on, any sizes and strides. sm90: gated, bf16 and fp16, D ≤ 3072 and L
// multiples of 64, at most 8 heads, h with channels or instances contiguous as TMA reads them.
MakeKernels generic_kernels, sm90_kernels;

// Why the sm90 kernels do not take the tensors, in a sentence, or "".
std::string sm90_obstacle(const Inputs& in);

// pooled [B, K, D] in h's type and scores [B, K, N] or [K, T] in fp32; or the scores alone.
std::tuple<Tensor, Tensor> forward(const Inputs& in, MakeKernels* make);
Tensor scores(const Inputs& in, MakeKernels* make);

// Gradients in h's type of what `needs` asks for, a bit each; the others are empty. pooled is not needed: scores are.
Gradients backward(
    const Optional& grad_pooled, const Optional& grad_scores, const Inputs& in, const Tensor& scores, int64_t needs,
    MakeKernels* make);

// h pooled by given scores, fp32 in that layout, and the gradients of (scores, h). The weights have L = 0.
Tensor pool_by_scores(const Tensor& given, const Inputs& in);
std::tuple<Tensor, Tensor> pool_by_scores_backward(
    const Tensor& grad_pooled, const Tensor& given, const Inputs& in, bool need_scores, bool need_h);

}  // namespace ercn::pool
