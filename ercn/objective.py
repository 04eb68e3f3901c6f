"""The training objective of ERCN: the hybrid equivariant loss over two views of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ercn import losses
from ercn.config import LossConfig, ModelConfig
from ercn.elements import resize
from ercn.models import ERCN, ERCNOutput, activation, targets_from_grades
from ercn.transforms import Identity, Transform


def reads_refined(loss: LossConfig, one_view: bool) -> bool:
    """Whether a loss term needs the refined CAM."""
    return bool(loss.ecr or loss.consistency or loss.min_pool or loss.er and one_view)


def ercn_loss(
    model: ERCN,
    image: Tensor,
    grade: Tensor,
    model_config: ModelConfig,
    loss_config: LossConfig,
    transform: Transform,
    *,
    weight_scale: float = 1.0,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = cls·L_cls + weight_scale · (er·L_ER + ecr·L_ECR + consistency·H + min_pool·L_min) on views x and A(x).

    - cls: classification of the picture, mean over the views and over the logits of CAM and MIL head.
    - er: max-normed CAM of x, transformed by A, against that of A(x). With one view: CAM against refined CAM
      (Chikontwe).
    - ecr: refined CAM of each view against the max-normed CAM of the other, hardest values.
    - consistency: cross entropy of CAM and refined CAM in each view, weighted by the spatial mask; mean of the views.
    - min_pool: SEAM's min-pooling of the refined CAM; mean of the views.

    The refined CAM is resized to the grid of the CAM, and max-normed too with ``scale_refined``. The maps are
    multiplied by the picture's targets (multi-hot where targets are ordinal; 1 for the background), so a picture of
    grade 0 has an empty foreground. They are compared on view 2's grid of feature-map elements; where transforming the
    map and transforming the picture round to different sizes, the transformed map is resized once more. Elements of
    view 2 from outside the picture do not count in er and ecr.

    Args:
        model: gives ``ERCNOutput``; called once per view, with ``refine`` true where a term needs the refined CAM.
        image: [B, 3, H, W]. grade: [B] integers.
        transform: A, from ``sample_transform`` with the model's ``align_corners``; ``Identity`` means one view.
        weight_scale: multiplies every weight but that of cls (warm-up).
        class_weight: [num_grades], multiplies L_cls of a picture by the weight of its grade; they should average 1 over
            the training set.

    Returns:
        The total, and each term that has a weight, by name, unweighted and detached.
    """
    if class_weight is not None and class_weight.shape != (model_config.num_grades,):
        raise ValueError(
            f"class_weight must have one weight for each of the {model_config.num_grades} grades; "
            f"got shape {list(class_weight.shape)}"
        )
    target = targets_from_grades(grade, model_config)  # [B, F]
    present = target[:, :, None, None]
    present_all = F.pad(present, (0, 0, 0, 0, 1, 0), value=1.0)  # [B, 1 + F, 1, 1], background first

    one_view = isinstance(transform, Identity)
    refine = reads_refined(loss_config, one_view)
    view1 = model(image, refine=refine)
    view2 = view1 if one_view else model(transform(image), refine=refine)
    views = (view1,) if one_view else (view1, view2)
    h, w = view2.cam.shape[-2:]

    def classification(view: ERCNOutput) -> Tensor:
        weight = None if class_weight is None else class_weight[grade][:, None]
        heads = [logits for logits in (view.cam_logits, view.mil_logits) if logits is not None]
        return sum(losses.classification_loss(logits, target, weight=weight) for logits in heads) / len(heads)

    def normed(view: ERCNOutput) -> tuple[Tensor, Tensor]:
        refined = resize(view.refined_cam, view.cam.shape[-2:], model.align_corners, antialias=True)
        refined = losses.max_norm(refined) if loss_config.scale_refined else refined
        return losses.max_norm(activation(view.cam, model_config.cam_pool)) * present, refined * present_all

    def consistency(view: ERCNOutput) -> Tensor:
        cam, refined = normed(view)
        cam, refined = losses.add_background(cam), refined.detach() if loss_config.detach_refined else refined
        return losses.refinement_consistency(cam, refined, view.mask, eps=loss_config.consistency_eps)

    def moved(x: Tensor) -> Tensor:
        return resize(transform(x), (h, w), model.align_corners)

    def mean_over_views(term) -> Tensor:
        return sum(term(view) for view in views) / len(views)

    (cam1, refined1), (cam2, refined2) = (map(moved, normed(view1))), normed(view2)
    valid = None if one_view else transform.valid(h, w, image.device)

    def equivariance() -> Tensor:
        if one_view:
            return losses.equivariance_loss(cam1, refined1[:, 1:])
        return losses.equivariance_loss(cam1, cam2, valid=valid)

    terms = {"cls": mean_over_views(classification)}
    if loss_config.er:
        terms["er"] = equivariance()
    if loss_config.ecr:
        fraction = loss_config.hard_fraction
        terms["ecr"] = losses.equivariant_cross_loss(cam1, refined1, cam2, refined2, fraction=fraction, valid=valid)
    if loss_config.consistency:
        terms["consistency"] = mean_over_views(consistency)
    if loss_config.min_pool:
        terms["min_pool"] = mean_over_views(lambda view: losses.min_pooling_loss(view.refined_cam[:, 1:] * present))

    weights = {name: getattr(loss_config, name) * (1.0 if name == "cls" else weight_scale) for name in terms}
    total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return total, {name: term.detach() for name, term in terms.items()}
