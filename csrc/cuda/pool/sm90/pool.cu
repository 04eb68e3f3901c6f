// The Hopper kernels behind the driver's interface, and what they do not take.
#include "pool/driver.h"
#include "pool/sm90/kernels.h"

namespace ercn::sm90 {
namespace {

class Hopper : public pool::Kernels {
 public:
  Hopper(const pool::Problem& p, const arch::Stream& stream)
      : p_(p), stream_(stream), maps_{instances(), weights(p.weights.v, kUnits), weights(p.weights.u, kUnits)} {}

  void forward(const pool::ForwardParams& p) const override { pool_forward({p, maps_}, stream_); }
  void dots(const pool::DotsParams& p) const override { pool_dots({p, maps_.h}, stream_); }
  void branch(const pool::BranchParams& p) const override { pool_branch({p, maps_}, stream_); }
  void row_gradient(const pool::RowGradientParams& p) const override {
    pool_row_gradient({p, matrix(p.dp), weights(p_.weights.v, kDepth), weights(p_.weights.u, kDepth)}, stream_);
  }
  void weight_gradient(const pool::WeightGradientParams& p) const override {
    pool_weight_gradient({p, matrix(p.dp), maps_.h}, stream_);
  }

  int64_t columns() const override { return 2 * p_.L; }
  WeightTiling weight_tiling(bool need_v, bool need_u, int64_t slots) const override {
    return sm90::weight_tiling(need_v, need_u, p_.L, p_.D, slots, stream_.multiprocessors());
  }

 private:
  static constexpr int64_t kBytes = 2;  // of an element

  template <int RANK>
  arch::TensorMap map(
      const void* data, const std::array<int64_t, RANK>& sizes, const std::array<int64_t, RANK - 1>& strides,
      const std::array<int, RANK>& box) const {
    return with_half(p_.type, [&](auto element) {
      return arch::make_tensor_map<decltype(element), RANK>(data, sizes, strides, box);
    });
  }
  // h as [B, N, D], or [1, T, D].
  arch::TensorMap instances() const {
    const pool::Instances& h = p_.h;
    const bool ragged = p_.bags.cu_seqlens != nullptr;
    const int64_t bags = ragged ? 1 : p_.bags.count, rows = ragged ? p_.bags.rows : p_.bags.n;
    const int64_t bag_bytes = bags > 1 ? h.stride_b * kBytes : 16;  // one bag has no next one
    if (is_channels_first(p_)) {
      return map<3>(h.data, {rows, p_.D, bags}, {h.stride_d * kBytes, bag_bytes}, {kSegmentRows, kDepth, 1});
    }
    const int64_t row_bytes = (rows > 1 ? h.stride_n : p_.D) * kBytes;
    return map<3>(h.data, {p_.D, rows, bags}, {row_bytes, bag_bytes}, {kDepth, kSegmentRows, 1});
  }
  // A contiguous matrix [rows, columns] in boxes of `box` rows and 64 columns.
  arch::TensorMap matrix(const void* data, int64_t rows, int64_t columns, int box) const {
    return map<2>(data, {columns, rows}, {columns * kBytes}, {kDepth, box});
  }
  arch::TensorMap weights(const void* data, int box) const { return matrix(data, p_.L, p_.D, box); }
  arch::TensorMap matrix(const pool::BranchGradients& dp) const {
    return matrix(dp.data, (dp.last_slot - dp.first_slot) * kSegmentRows, columns(), kSegmentRows);
  }

  const pool::Problem& p_;
  const arch::Stream& stream_;
  const ProjectionMaps maps_;
};

}  // namespace
}  // namespace ercn::sm90

namespace ercn::pool {

std::string sm90_obstacle(const Inputs& in) {
  using namespace sm90;
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
           "got D = " +
           std::to_string(D) + ", L = " + std::to_string(L) + ", K = " + std::to_string(K);
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

std::unique_ptr<Kernels> sm90_kernels(const Tensor&, const Problem& p, const arch::Stream& stream) {
  return std::make_unique<sm90::Hopper>(p, stream);
}

}  // namespace ercn::pool
