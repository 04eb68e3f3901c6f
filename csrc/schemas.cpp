// The schemas of ercn::*. Python spells them too, for where this library is absent; a test compares the two.
#include <torch/csrc/stable/library.h>

// Functions of torch 2.12 and newer. torch.compile may refuse operators without the tag.
#define ERCN_IF_THERE extern "C" __attribute__((weak, visibility("default")))
ERCN_IF_THERE AOTITorchError
torch_library_def_with_tags(TorchLibraryHandle library, const char* schema, const int32_t* tags, int32_t count);
ERCN_IF_THERE int32_t torch_tag_pt2_compliant_tag();

#define ERCN_POOL_INPUTS                                                                                           \
  "Tensor h, Tensor v_weight, Tensor? v_bias, Tensor? u_weight, Tensor? u_bias, Tensor w_weight, Tensor? w_bias, " \
  "Tensor? mask, Tensor? cu_seqlens, Tensor? seed, float dropout_p, str activation"

namespace {

struct Schemas {
  TorchLibraryHandle library;

  void define(const char* schema) const {
    if (torch_library_def_with_tags && torch_tag_pt2_compliant_tag) {
      const int32_t tag = torch_tag_pt2_compliant_tag();
      STABLE_TORCH_ERROR_CODE_CHECK(torch_library_def_with_tags(library, schema, &tag, 1));
    } else {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_library_def(library, schema));
    }
  }

  Schemas() {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_fragment("ercn", __FILE__, __LINE__, &library));
    define("relu_affinity(Tensor value, Tensor feat, str backend=\"\") -> Tensor");
    define(
        "relu_affinity_backward(Tensor grad_out, Tensor value, Tensor feat, bool need_value, str backend=\"\") -> "
        "(Tensor grad_value, Tensor grad_feat)");
    define("gated_attention_pool(" ERCN_POOL_INPUTS ", str backend=\"\") -> (Tensor pooled, Tensor scores)");
    define("attention_scores(" ERCN_POOL_INPUTS ", str backend=\"\") -> Tensor scores");
    define(
        "gated_attention_pool_backward(Tensor? grad_pooled, Tensor? grad_scores, " ERCN_POOL_INPUTS
        ", Tensor scores, bool[] needs, str backend=\"\") -> (Tensor grad_h, Tensor grad_v_weight, "
        "Tensor grad_v_bias, Tensor grad_u_weight, Tensor grad_u_bias, Tensor grad_w_weight, Tensor grad_w_bias)");
    define(
        "pool_by_scores(Tensor scores, Tensor value, Tensor? mask, Tensor? cu_seqlens, str backend=\"\") -> "
        "Tensor pooled");
    define(
        "pool_by_scores_backward(Tensor grad_pooled, Tensor scores, Tensor value, Tensor? mask, Tensor? cu_seqlens, "
        "bool[] needs, str backend=\"\") -> (Tensor grad_scores, Tensor grad_value)");
    define(
        "pixel_adaptive_refinement(Tensor cam, Tensor image, int[] dilations, int steps, str form, "
        "str backend=\"\") -> Tensor");
    define(
        "pixel_adaptive_refinement_backward(Tensor grad_out, Tensor image, int[] dilations, int steps, str form, "
        "str backend=\"\") -> Tensor");
  }
  ~Schemas() { aoti_torch_delete_library_object(library); }
} schemas;

}  // namespace
