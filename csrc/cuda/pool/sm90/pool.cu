// The operator by the pool's kernels on Hopper.
#include "pool/sm90/pool.h"

#include "pool/driver.h"
#include "pool/sm90/kernels.h"

namespace ercn::sm90 {
namespace {

class Hopper {
 public:
  Hopper(const Tensor&, const pool::Problem& p, const arch::Stream& stream)
      : p_(p), stream_(stream), maps_{instances(), matrix(p.v, p.L, p.D, kUnits), matrix(p.u, p.L, p.D, kUnits)} {}

  void forward(const pool::ForwardParams& p) const { pool_forward({p, maps_}, stream_); }
  void products(const pool::ProductsParams& p) const { pool_products({p, maps_.h}, stream_); }
  void branch(const pool::BranchParams& p) const { pool_branch({p, maps_}, stream_); }
  void rows(const pool::RowsParams& p) const {
    pool_rows({p, gradients(p), matrix(p_.v, p_.L, p_.D, kDepth), matrix(p_.u, p_.L, p_.D, kDepth)}, stream_);
  }
  void weights(const pool::WeightsParams& p) const { pool_weights({p, gradients(p), maps_.h}, stream_); }

  int64_t columns() const { return 2 * p_.L; }
  WeightShares shares(bool need_v, bool need_u, int64_t slots) const {
    return weight_shares(need_v, need_u, p_.L, p_.D, slots, stream_.multiprocessors());
  }

 private:
  static constexpr int64_t kBytes = 2;  // of an element

  template <int RANK>
  arch::TensorMap map(
      const void* of, const std::array<int64_t, RANK>& sizes, const std::array<int64_t, RANK - 1>& strides,
      const std::array<int, RANK>& box) const {
    return with_half(p_.type, [&](auto element) {
      return arch::make_tensor_map<decltype(element), RANK>(of, sizes, strides, box);
    });
  }
  // h as [B, N, D], or [1, T, D].
  arch::TensorMap instances() const {
    const bool ragged = p_.bags.cu_seqlens != nullptr;
    const int64_t bags = ragged ? 1 : p_.bags.count, rows = ragged ? p_.bags.rows : p_.bags.n;
    const int64_t bag_bytes = bags > 1 ? p_.h_b * kBytes : 16;  // one bag has no next one
    if (is_channels_first(p_)) {
      return map<3>(p_.h, {rows, p_.D, bags}, {p_.h_d * kBytes, bag_bytes}, {kSegmentRows, kDepth, 1});
    }
    const int64_t row_bytes = (rows > 1 ? p_.h_n : p_.D) * kBytes;
    return map<3>(p_.h, {p_.D, rows, bags}, {row_bytes, bag_bytes}, {kDepth, kSegmentRows, 1});
  }
  // A matrix [rows, columns] in boxes of `box` rows and 64 columns.
  arch::TensorMap matrix(const void* of, int64_t rows, int64_t columns, int box) const {
    return map<2>(of, {columns, rows}, {columns * kBytes}, {kDepth, box});
  }
  template <typename Params>
  arch::TensorMap gradients(const Params& p) const {
    return matrix(p.branch_grads, (p.last_slot - p.first_slot) * kSegmentRows, columns(), kSegmentRows);
  }

  const pool::Problem& p_;
  const arch::Stream& stream_;
  const ProductMaps maps_;
};

}  // namespace

std::string cannot_pool(const pool::Inputs& in) {
  const Tensor& h = in.h;
  if (const int capability = arch::compute_capability(h); capability != 90) {
    return "the Hopper kernels of the pool need compute capability 9.0; this GPU has " +
           std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  }
  if (!in.u_weight) return "the Hopper kernels of the pool are for gated attention; u_weight is None";
  if (h.scalar_type() != ScalarType::BFloat16 && h.scalar_type() != ScalarType::Half) {
    return "the Hopper kernels of the pool take bfloat16 and float16";
  }
  const int64_t D = h.size(h.dim() - 1), N = h.size(h.dim() - 2), L = in.v_weight.size(0), K = in.w_weight.size(0);
  if (D % kDepth != 0 || L % kDepth != 0 || D == 0 || D > kMaxSlabs * kDepth || L == 0 || K < 1 || K > kMaxHeads) {
    return "the Hopper kernels of the pool take D up to 3072 and L that are multiples of 64, and at most 8 heads; "
           "got D = " + std::to_string(D) + ", L = " + std::to_string(L) + ", K = " + std::to_string(K);
  }
  if (h.numel() / D > std::numeric_limits<int32_t>::max()) {
    return "the Hopper kernels of the pool take at most 2^31 - 1 instances";
  }
  const bool is_aligned = reinterpret_cast<uintptr_t>(h.const_data_ptr()) % 16 == 0;
  const int64_t rows = h.stride(h.dim() - 2), channels = h.stride(h.dim() - 1);
  const int64_t bags = h.dim() == 3 && h.size(0) > 1 ? h.stride(0) : 8;
  const int64_t outer = channels == 1 ? (N > 1 ? rows : 8) : channels;
  if ((channels != 1 && rows != 1) || outer % 8 != 0 || outer <= 0 || bags % 8 != 0 || bags <= 0 || !is_aligned) {
    return "the copy engine reads h where channels or instances are contiguous and the other strides and the address "
           "are multiples of 16 bytes";
  }
  return "";
}

std::tuple<Tensor, Tensor> pool_forward(const pool::Inputs& in) { return pool::forward<Hopper>(in); }

Tensor pool_scores(const pool::Inputs& in) { return pool::scores<Hopper>(in); }

pool::Gradients pool_backward(
    const pool::Optional& grad_pooled, const pool::Optional& grad_scores, const pool::Inputs& in, const Tensor& scores,
    int64_t needs) {
  return pool::backward<Hopper>(grad_pooled, grad_scores, in, scores, needs);
}

}  // namespace ercn::sm90
