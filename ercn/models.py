"""ERCN: grade from image labels alone, with maps of where the evidence lies.

After Fan et al., "ERCN" (J Imaging Inform Med 2025, doi 10.1007/s10278-024-01270-z). The text beyond the abstract is
not public: this is a reconstruction from SEAM (CVPR 2020), Chikontwe et al. (Med Image Anal 2022) and attention MIL
(Ilse et al., ICML 2018), and every reading of ours is a field of ``ModelConfig``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ercn.config import ModelConfig
from ercn.losses import normalize_cam
from ercn.nn import GatedAttentionPool, PixelCorrelation

OUTPUT_STRIDES = (8, 16, 32)


class ERCNOutput(NamedTuple):
    """What ``ERCN`` returns; F foreground channels, h × w elements of the last feature map.

    logits: [B, F], the fused prediction. cam_logits: [B, F]. mil_logits: [B, F], None without MIL.
    cam: [B, F, h, w] class activation maps before ReLU; cam_logits is the spatial mean of their positive part plus a
        learned prior, or their spatial mean (``ModelConfig.cam_pool``).
    refined_cam: [B, 1 + F, h, w] in [0, 1], float32, background first.
    mask: [B, 1, h, w] in [0, 1], the spatial mask m; all 1 when it is off.
    attention: [B, heads, h, w] attention scores before the softmax, None without MIL.
    """

    logits: Tensor
    cam_logits: Tensor
    mil_logits: Tensor | None
    cam: Tensor
    refined_cam: Tensor
    mask: Tensor
    attention: Tensor | None


class ERCN(nn.Module):
    """Backbone, CAM head, spatial mask, refinement by pixel affinity, and attention MIL over every feature-map element.

    Any picture size that the backbone takes, square or not. ``backbone`` is a timm feature extractor; its state dict is
    what contrastive pre-training exports. The refinement embeds the picture and the two stages before the last one, as
    SEAM does (of a ResNet-50: 512 and 1024 channels, SEAM's widths).

    Modules, and so the first part of every parameter's name: backbone, classifier, refinement, and, with MIL, pool and
    mil_classifier.

    Raises:
        ValueError: a configuration that does not fit together, or a backbone that is unknown or does not support the
            output stride (the message lists those it does).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.pool == "none" and config.fusion != "cam":
            raise ValueError(f"pool 'none' leaves only the CAM's logits: fusion must be 'cam' but is '{config.fusion}'")
        least = 3 if config.targets == "referable" else 2
        if config.num_grades < least:
            raise ValueError(f"targets '{config.targets}' need num_grades >= {least}; got {config.num_grades}")
        if config.patch % config.output_stride:
            raise ValueError(
                f"patch must be a multiple of output_stride {config.output_stride}, or 0; got {config.patch}"
            )
        self.config = config
        self.backbone = create_backbone(config.backbone, config.output_stride, pretrained=config.pretrained)
        *_, low, mid, last = self.backbone.feature_info.channels()
        classes = foreground_channels(config)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(last, classes, 1, bias=False)
        nn.init.xavier_uniform_(self.classifier.weight)
        self.prior = nn.Parameter(torch.zeros(classes)) if config.cam_pool == "relu" else None
        self.refinement = PixelCorrelation((low, mid), config.embed_dim, steps=config.steps, center=config.center)
        self.pool = self.mil_classifier = None
        if config.pool != "none":
            self.pool = GatedAttentionPool(last, config.pool_dim, gated=config.pool == "gated")
            self.mil_classifier = nn.Linear(last, classes)

    def forward(self, image: Tensor) -> ERCNOutput:
        """image: [B, 3, H, W], normalised as the backbone was trained."""
        low, mid, last = self._features(image)
        last = self.dropout(last)

        cam = self.classifier(last)  # [B, F, h, w]
        if self.prior is None:
            cam_logits = cam.mean((2, 3))
        else:
            cam_logits = cam.relu().mean((2, 3)) + self.prior

        source = cam.detach() if self.config.detach else cam
        features = [low.detach(), mid.detach()] if self.config.detach else [low, mid]
        confidence = normalize_cam(source)  # [B, 1 + F, h, w]
        mask = self._spatial_mask(confidence)
        refined_cam = self._suppress(confidence, mask)
        if self.config.steps:
            refined_cam = self.refinement(refined_cam, features, image)

        attention = mil_logits = None
        if self.pool is not None:
            pooled, attention = self.pool(last)  # [B, heads, D], [B, heads, h, w]
            mil_logits = self.mil_classifier(pooled.flatten(1))

        logits = {"cam": cam_logits, "mil": mil_logits}.get(self.config.fusion)
        if logits is None:
            logits = (cam_logits + mil_logits) / 2
        return ERCNOutput(logits, cam_logits, mil_logits, cam, refined_cam, mask, attention)

    def _features(self, image: Tensor) -> list[Tensor]:
        """The last three stages, [B, D, h, w] each; with patches, of each patch the mean over its own map."""
        patch = self.config.patch
        if not patch:
            return stages(self.backbone, image)[-3:]
        b, _, height, width = image.shape
        if height % patch or width % patch:
            raise ValueError(f"patches of {patch} px need sides that are multiples of it; got {height} x {width} px")
        h, w = height // patch, width // patch
        tiles = image.unflatten(3, (w, patch)).unflatten(2, (h, patch))  # [B, 3, h, P, w, P]
        maps = stages(self.backbone, tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2))[-3:]  # [B·h·w, D, ·, ·]
        return [x.mean((2, 3)).view(b, h, w, -1).permute(0, 3, 1, 2) for x in maps]

    def _spatial_mask(self, confidence: Tensor) -> Tensor:
        """m = mean over thresholds t of [max foreground confidence >= t], [B, 1, h, w]."""
        largest = confidence[:, 1:].amax(1, keepdim=True)
        if self.config.mask == "off":
            return torch.ones_like(largest)
        return torch.stack([(largest >= t).to(largest.dtype) for t in self.config.mask_thresholds]).mean(0)

    def _suppress(self, confidence: Tensor, mask: Tensor) -> Tensor:
        """Multiply the foreground by m ("soft") or keep it where m is 1 ("hard"); the background takes the rest."""
        if self.config.mask == "hard":
            mask = (mask == 1).to(mask.dtype)
        foreground = mask * confidence[:, 1:]
        return torch.cat([1 - foreground.amax(1, keepdim=True), foreground], 1)


def create_backbone(name: str, output_stride: int, *, pretrained: bool = False) -> nn.Module:
    """A timm feature extractor whose last stage has one element for ``output_stride`` input pixels each way.

    Args:
        name: any timm model that supports ``features_only``.
        output_stride: 8, 16 or 32. Where timm's model has no such argument, its own stride must be this one.
        pretrained: timm's weights, from its cache or the network; otherwise nothing is downloaded.

    Raises:
        ValueError: unknown model or unsupported stride; the message lists the strides it supports.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("ercn.models needs timm: pip install 'ercn[train]'", name=error.name) from error

    if not timm.is_model(name):
        raise ValueError(f"unknown backbone '{name}'; timm.list_models() names those that timm has")

    def build(stride: int, **kwargs) -> nn.Module | None:
        """The model, None where it does not support the stride; how timm's models say so differs."""
        for arguments in ({"output_stride": stride}, {}):
            try:
                model = timm.create_model(name, features_only=True, **arguments, **kwargs)
            except (AssertionError, NotImplementedError, TypeError, ValueError):
                continue
            if model.feature_info.reduction()[-1] == stride:
                return model
        return None

    model = build(output_stride, pretrained=pretrained)
    if model is None:
        supported = ", ".join(str(stride) for stride in OUTPUT_STRIDES if build(stride) is not None)
        raise ValueError(
            f"backbone '{name}' does not support output_stride {output_stride}; "
            f"it supports {supported or 'none of 8, 16 and 32'}"
        )
    return model


def stages(backbone: nn.Module, image: Tensor) -> list[Tensor]:
    """All stages of a backbone of ``create_backbone`` as [B, C, h, w]; some timm models put the channels last."""
    maps = backbone(image)
    return [x.permute(0, 3, 1, 2) for x in maps] if getattr(backbone, "output_fmt", None) == "NHWC" else list(maps)


def foreground_channels(config: ModelConfig) -> int:
    """F: num_grades - 1 for ordinal and one-hot targets, 1 for referable."""
    return 1 if config.targets == "referable" else config.num_grades - 1


def targets_from_grades(grade: Tensor, config: ModelConfig) -> Tensor:
    """Multi-label targets of grades: [B] integers in 0 … K-1 -> [B, F] float32.

    ordinal: channel k is [grade >= k], k = 1 … K-1. onehot: channel k is [grade = k]. referable: [grade >= 2]. Grade 0
    has no foreground.
    """
    if config.targets == "referable":
        return (grade >= 2).float()[:, None]
    levels = torch.arange(1, config.num_grades, device=grade.device)
    grade = grade[:, None]
    return (grade >= levels if config.targets == "ordinal" else grade == levels).float()


def grade_probabilities(logits: Tensor, config: ModelConfig) -> Tensor:
    """Probabilities of the grades (of "not referable, referable" for referable targets) from logits.

    ordinal: sigmoid(logit_k) estimates P(grade >= k); a running minimum over k makes it fall, differences give
    P(grade = k). onehot: softmax over [0, logits]. referable: [1 - p, p].

    Args:
        logits: [B, F].

    Returns:
        [B, K], K = 2 for referable; at least float32, rows sum to 1.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if config.targets == "onehot":
        return F.pad(logits, (1, 0)).softmax(1)
    at_least = logits.sigmoid().cummin(1).values  # [B, F]
    at_least = F.pad(F.pad(at_least, (1, 0), value=1.0), (0, 1))  # P(grade >= 0) = 1, P(grade >= K) = 0
    return at_least[:, :-1] - at_least[:, 1:]
