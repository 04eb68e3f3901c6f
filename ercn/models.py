"""The ERCN network: grades from image labels alone, with maps of the evidence.

After Fan et al., "ERCN" (J Imaging Inform Med 2025, doi 10.1007/s10278-024-01270-z). The text beyond the abstract is
not public: this is a reconstruction from SEAM (CVPR 2020), Chikontwe et al. (Med Image Anal 2022) and attention MIL
(Ilse et al., ICML 2018), and every reading of ours is a field of ``ModelConfig``.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import _register_namedtuple

from ercn.config import ModelConfig
from ercn.elements import GEOMETRY, aligned_corners, centre, cuts_patches, resize, resize_exactly, symmetrize
from ercn.losses import EPS, add_background, full, normalize_cam
from ercn.nn import GatedAttentionPool, PixelAdaptiveRefinement, PixelCorrelation
from ercn.pretrained import load_pretrained

OUTPUT_STRIDES = (8, 16, 32)
_Correction = Callable[[nn.Module], nn.Module]
# (backbone, output stride, its other arguments, corrections to try) to the correction and ``align_corners`` after it,
# which are measured once.
_ALIGNED: dict[tuple[str, int, str, tuple[_Correction, ...]], tuple[_Correction, bool | None]] = {}
_FREE_SIZE = {"dynamic_img_size": True, "strict_img_size": False}  # with these, a network of one size takes others
# Arguments of timm.create_model that ercn sets.
_TAKEN = "checkpoint_path", "features_only", "in_chans", "num_classes", "output_stride", "pretrained", "pretrained_cfg"


class ERCNOutput(NamedTuple):
    """What ``ERCN`` returns; F foreground channels, h × w elements of the last feature map.

    logits: [B, F], the fused prediction. cam_logits: [B, F]. mil_logits: [B, F], None without MIL.
    cam: [B, F, h, w] class activation maps before the activation of ``ModelConfig.cam_pool``.
    refined_cam: [B, 1 + F, h', w'] in [0, 1], float32, background first, on the grid of its last refinement.
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


_register_namedtuple(ERCNOutput, serialized_type_name="ercn.models.ERCNOutput")  # for torch.export.save


class ERCN(nn.Module):
    """Backbone, CAM head, spatial mask, refinement by pixel affinity, and attention MIL over every feature-map element.

    Any picture size that the backbone takes, square or not; sides at which the map would not be symmetric are resized
    first (``ercn.elements``). ``backbone`` is a timm feature extractor; contrastive pre-training exports its state
    dict. The refinement embeds the picture and the stages ``refine_stages``, by default the two before the last one, as
    SEAM does (of a ResNet-50: 512 and 1024 channels, SEAM's widths).

    Parameters' names begin with backbone, classifier, refinement; prior, except with cam_pool "linear"; and, with MIL,
    pool and mil_bias or, with evidence "separate", mil_classifier.

    Attributes:
        align_corners: whether the outer elements of the maps lie on the outer pixels of the picture, or inside cells.

    Args:
        geometry: version of an export (``ercn.elements.GEOMETRY``). With 1 nothing is corrected or resized, and maps
            are cells; with 2, patches are not resized; with 2 and 3, networks of one picture size are not corrected,
            and no convolutions are centred.

    Raises:
        ValueError: a configuration that does not fit together, or a backbone that is unknown or does not support the
            output stride (the message lists those it does).
    """

    def __init__(self, config: ModelConfig, *, geometry: int = GEOMETRY) -> None:
        super().__init__()
        if config.pool == "none" and config.fusion != "cam":
            raise ValueError(f"pool 'none' leaves only the CAM's logits: fusion must be 'cam' but is '{config.fusion}'")
        if config.pool == "none" and config.evidence == "additive":
            raise ValueError("evidence 'additive' is what attention makes of the features: pool must not be 'none'")
        least = 3 if config.targets == "referable" else 2
        if config.num_grades < least:
            raise ValueError(f"targets '{config.targets}' need num_grades >= {least}; got {config.num_grades}")
        if config.patch % config.output_stride:
            raise ValueError(
                f"patch must be a multiple of output_stride {config.output_stride}, or 0; got {config.patch}"
            )
        if config.patch and config.refine_stride:
            raise ValueError("refine_stride needs maps finer than the patches: it must be 0 with patch > 0")
        if "pamr" in config.refinement and "affinity" in config.refinement[config.refinement.index("pamr") :]:
            raise ValueError(
                "refinement must have 'affinity' before 'pamr', after which every pixel would be an element; "
                f"got {list(config.refinement)}"
            )
        self.config, self.geometry = config, geometry
        symmetric = geometry > 1
        self.backbone = create_backbone(
            config.backbone,
            config.output_stride,
            pretrained=config.pretrained,
            kwargs=config.backbone_kwargs,
            geometry=geometry,
        )
        self.align_corners = symmetric and not config.patch and self.backbone.align_corners
        channels = self.backbone.feature_info.channels()
        last, classes = channels[-1], foreground_channels(config)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(last, classes, 1, bias=False)
        if config.evidence == "additive":
            self.classifier = nn.Sequential(
                nn.Conv2d(last, config.pool_dim, 1), nn.ReLU(), nn.Conv2d(config.pool_dim, classes, 1, bias=False)
            )
        for layer in self.classifier.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
        self.prior = None if config.cam_pool == "linear" else nn.Parameter(torch.zeros(classes))
        try:
            embedded = [channels[i] for i in config.refine_stages]
        except IndexError:
            raise ValueError(
                f"refine_stages must be among the {len(channels)} stages of {config.backbone}, 0 to "
                f"{len(channels) - 1} or negative; got {list(config.refine_stages)}"
            ) from None
        self.refinement = PixelCorrelation(
            embedded,
            config.embed_dim,
            steps=config.steps,
            center=config.center,
            align_corners=self.align_corners or not symmetric,
        )
        self.pool = self.mil_classifier = self.mil_bias = None
        if config.pool != "none":
            heads = classes if config.evidence == "classwise" else 1
            self.pool = GatedAttentionPool(last, config.pool_dim, heads, gated=config.pool == "gated")
            if config.evidence == "separate":
                self.mil_classifier = nn.Linear(last, classes)
            else:
                self.mil_bias = nn.Parameter(torch.zeros(classes))

    def forward(self, image: Tensor, *, refine: bool = True, pamr: bool = True) -> ERCNOutput:
        """image: [B, 3, H, W], normalised as the backbone was trained. refine: False leaves ``refined_cam`` as the mask
        made it, where only logits are needed. pamr: False leaves out that refinement, for ``refine_to_edges`` later.
        """
        image = self._exact(image)
        features = self._features(image)
        last = self.dropout(features[-1])

        pooled = attention = mil_logits = None
        if self.pool is not None:
            pooled, attention = self.pool(last)  # [B, heads, D], [B, heads, h, w]
        cam = self._cam(last, attention)
        cam_logits = self._pool_cam(cam)
        if pooled is not None:
            mil_logits = self._mil_logits(pooled, cam)
        logits = {"cam": cam_logits, "mil": mil_logits}.get(self.config.fusion)
        if logits is None:
            logits = (cam_logits + mil_logits) / 2

        refinement = [name for name in self.config.refinement if refine and (pamr or name != "pamr")]
        mask, refined_cam = self._refine(cam, logits, features, image, refinement)
        return ERCNOutput(logits, cam_logits, mil_logits, cam, refined_cam, mask, attention)

    def _exact(self, image: Tensor) -> Tensor:
        """The picture at the sides where the map is symmetric; patches are resized one by one."""
        return image if self.config.patch or self.geometry == 1 else self._at_exact_sides(image)

    def _at_exact_sides(self, image: Tensor) -> Tensor:
        return resize_exactly(image, self.config.output_stride, self.backbone.align_corners)

    def _cam(self, last: Tensor, attention: Tensor | None) -> Tensor:
        """The CAM of the last feature map, [B, F, h, w]."""
        if self.config.evidence != "additive":
            return self.classifier(last)
        weight = full(attention).flatten(2).softmax(2).view_as(attention)
        with torch.autocast(last.device.type, enabled=False):  # N a_i h_i can exceed float16
            return self.classifier((full(last) * weight * weight[0, 0].numel()).to(self.mil_bias.dtype))

    def _pool_cam(self, cam: Tensor) -> Tensor:
        """Picture logits from the CAM, [B, F], at least float32; formulas as in ``ModelConfig.cam_pool``."""
        kind, cam = self.config.cam_pool, full(cam).flatten(2)
        if kind == "topk":
            pooled = cam.topk(max(1, cam.shape[2] // 10), sorted=False).values.mean(2)
        elif kind == "lse":
            pooled = cam.logsumexp(2) - math.log(cam.shape[2])
        elif kind == "gem":
            pooled = F.softplus(cam).pow(3).mean(2).pow(1 / 3)
        else:
            pooled = {"relu": F.relu, "softplus": F.softplus, "linear": nn.Identity()}[kind](cam).mean(2)
        pooled = self.config.cam_scale * pooled
        return pooled if self.prior is None else pooled + self.prior

    def _mil_logits(self, pooled: Tensor, cam: Tensor) -> Tensor:
        """Picture logits from the attention, [B, F]; formulas as in ``ModelConfig.evidence``."""
        kind = self.config.evidence
        if kind == "separate":
            return self.mil_classifier(pooled.flatten(1))
        if kind == "additive":
            return full(cam).mean((2, 3)) + self.mil_bias
        weight = self.classifier.weight.flatten(1)  # [F, D], broadcast over the heads: one, or one for each channel
        return (pooled * weight).sum(2) + self.mil_bias

    def _refine(
        self, cam: Tensor, logits: Tensor, features: list[Tensor], image: Tensor, refinement: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """The spatial mask, and the masked CAM after the refinements."""
        config = self.config
        if config.detach:
            cam, logits, features = cam.detach(), logits.detach(), [x.detach() for x in features]
        confidence = self._confidence(cam, logits)
        mask = self._spatial_mask(confidence)
        refined = self._suppress(confidence, mask)
        for stage in refinement:
            if stage == "affinity":
                refined = self._propagate(refined, features, image)
            elif not self.training:
                refined = self.refine_to_edges(refined, image)
        return mask, refined

    def refine_to_edges(self, refined_cam: Tensor, image: Tensor) -> Tensor:
        """The refinement "pamr": [B, 1 + F, h, w] to the side at which the picture [B, 3, H, W] is exact."""
        image = self._exact(image)
        refined = resize(refined_cam, image.shape[-2:], self.align_corners)
        reach = dilations(min(image.shape[-2:]), self.config.pamr_reach)
        return add_background(PixelAdaptiveRefinement(reach, self.config.pamr_steps)(refined[:, 1:], image))

    def _confidence(self, cam: Tensor, logits: Tensor) -> Tensor:
        """Class confidences, [B, 1 + F, h, w] in [0, 1], background first."""
        evidence = activation(full(cam), self.config.cam_pool)
        if self.config.confidence == "relative":
            return normalize_cam(evidence)
        evidence = evidence / (evidence.amax((2, 3), keepdim=True) + EPS)
        return add_background(evidence * channel_probabilities(logits, self.config)[:, :, None, None])

    def _propagate(self, cam: Tensor, features: list[Tensor], image: Tensor) -> Tensor:
        """``cam`` after the pixel affinity, on the grid of ``refine_stride``."""
        stride, corners = self.config.refine_stride, int(self.align_corners)
        if stride:
            size = [(side - corners) // stride + corners for side in image.shape[-2:]]
            cam = resize(cam, size, self.align_corners)
            image = resize(image, size, self.align_corners, antialias=True)
        return self.refinement(cam, [features[i] for i in self.config.refine_stages], image)

    def _features(self, image: Tensor) -> list[Tensor]:
        """All stages, [B, D, h, w] each; with patches, an element is the mean over its patch's own map."""
        patch = self.config.patch
        if not patch:
            return stages(self.backbone, image)
        b, _, height, width = image.shape
        if height % patch or width % patch:
            raise ValueError(f"patches of {patch} px need sides that are multiples of it; got {height} x {width} px")
        h, w = height // patch, width // patch
        tiles = image.unflatten(3, (w, patch)).unflatten(2, (h, patch))  # [B, 3, h, P, w, P]
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        maps = stages(self.backbone, self._at_exact_sides(tiles) if self.geometry > 2 else tiles)  # [B·h·w, D, ·, ·]
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
        return add_background(mask * confidence[:, 1:])


def create_backbone(
    name: str,
    output_stride: int,
    *,
    pretrained: bool | str = False,
    kwargs: Mapping[str, Any] | None = None,
    geometry: int = GEOMETRY,
) -> nn.Module:
    """A timm feature extractor whose last stage has one element for ``output_stride`` input pixels each way.

    The stages of a ViT are blocks, by default the last three, and its output stride is the size of its patches. The
    attribute ``align_corners`` says where the elements lie (``ercn.elements``); ``loaded`` describes the weights that
    were read from a file (``ercn.pretrained.Loaded``), or is None. Average pools that would move elements are replaced
    by symmetric ones, which moves the shortcuts of pre-trained "d" ResNets by half a pixel. In networks that must have
    cells (MaxViT) strided convolutions are centred on the cells, which moves their outputs by half a pixel of the
    input.

    Args:
        name: any timm model that supports ``features_only``.
        output_stride: 8, 16, 32, or the network's own. Where timm's model has no such argument, it must be its own.
        pretrained: timm's weights, from its cache or the network; or a path (``ercn.pretrained``); otherwise nothing
            is read.
        kwargs: further arguments of ``timm.create_model``.
        geometry: version of an export, as in ``ERCN``.

    Raises:
        ValueError: unknown model, arguments that it does not take, or a stride that it does not support or at which its
            elements do not lie symmetrically (such as a dilated ConvNeXt); the message lists what the model takes.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("ercn.models needs timm: pip install 'ercn[train]'", name=error.name) from error

    if not timm.is_model(name):
        raise ValueError(f"unknown backbone '{name}'; timm.list_models() names those that timm has")
    kwargs = dict(kwargs or {})
    own = _check_arguments(name, kwargs)

    def build(stride: int, **more) -> nn.Module | None:
        """The model, None where it does not support the stride, which timm's models say by different errors."""
        for arguments in (kwargs | {"output_stride": stride}, kwargs):
            try:
                model = timm.create_model(name, features_only=True, **arguments, **more)
            except (AssertionError, NotImplementedError, TypeError, ValueError):
                continue
            if model.feature_info.reduction()[-1] != stride:
                continue
            if geometry > 1:
                correct, model.align_corners = _geometry(name, stride, arguments, model, geometry)
                if model.align_corners is None:
                    continue
                correct(model)
            return model
        return None

    model = build(output_stride, pretrained=pretrained is True)
    if model is None:
        with _without_data():
            supported = [stride for stride in sorted({*OUTPUT_STRIDES, own}) if build(stride) is not None]
        raise ValueError(
            f"backbone '{name}' does not support output_stride {output_stride}; it supports "
            f"{', '.join(map(str, supported)) or 'none at which its elements lie symmetrically in the picture'}"
        )
    model.img_size = _img_size(model, kwargs)
    model.loaded = load_pretrained(model, pretrained, name) if isinstance(pretrained, str) else None
    return model


@contextmanager
def _without_data() -> Iterator[None]:
    """Builds networks without data and without random draws, under any mode of the caller."""
    with unset_fake_temporarily(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield


def _check_arguments(name: str, kwargs: Mapping[str, Any]) -> int:
    """The model's own stride; ValueError where timm does not build the model with these arguments."""
    import timm

    if taken := [key for key in kwargs if key in _TAKEN]:
        raise ValueError(f"backbone_kwargs must not have {', '.join(taken)}: ercn itself sets {', '.join(_TAKEN)}")
    try:
        with _without_data():
            return timm.create_model(name, features_only=True, **kwargs).feature_info.reduction()[-1]
    except Exception as error:  # models raise many kinds for arguments that do not fit
        if not kwargs:
            raise ValueError(f"backbone '{name}' has no feature maps in timm: {_first_line(error)}") from error
        raise ValueError(
            f"backbone_kwargs {dict(kwargs)} are not what timm builds '{name}' with ({_first_line(error)}); "
            f"it takes {', '.join(_arguments(name))}"
        ) from error


def _arguments(name: str) -> list[str]:
    """Names of the arguments that a timm model takes, without those that ercn sets."""
    import timm

    with _without_data():
        model = timm.create_model(name)
    parameters = inspect.signature(type(model)).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    for p in parameters:
        if p.name == "cfg" and is_dataclass(p.annotation):  # other arguments overwrite its fields
            known += [field.name for field in fields(p.annotation)]
    return [key for key in known if key not in (*_TAKEN, "cfg", "device", "dtype")]


def _img_size(model: nn.Module, kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """The sides of the pictures that timm's model is built for, None where it takes any."""
    size = kwargs.get("img_size") or model.pretrained_cfg["input_size"][1:]
    free = any(kwargs.get(key) is value for key, value in _FREE_SIZE.items())
    fixed = model.pretrained_cfg.get("fixed_input_size") and not free
    return tuple((size, size) if isinstance(size, int) else size) if fixed else None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _geometry(
    name: str, stride: int, arguments: Mapping[str, Any], model: nn.Module, geometry: int
) -> tuple[_Correction, bool | None]:
    """The correction of timm's ``model`` of these arguments, and ``align_corners``, None where none corrects it."""
    import timm

    config = model.pretrained_cfg
    fixed = bool(config.get("fixed_input_size"))
    if cuts_patches(model) or fixed and geometry < 4:
        return symmetrize, False
    corrections = (symmetrize, centre) if geometry > 3 else (symmetrize,)
    key = name, stride, json.dumps(arguments, sort_keys=True, default=str), corrections
    if key not in _ALIGNED:
        sized = (fixed or "img_size" in arguments) and "img_size" in _arguments(name)

        def make(correct: _Correction, side: int) -> nn.Module:
            size = {"img_size": side} if sized else {}
            return correct(timm.create_model(name, features_only=True, **{**arguments, **size}))

        for correct in corrections:
            own = config["input_size"][-1] if fixed else None
            _ALIGNED[key] = correct, aligned_corners(partial(make, correct), _maps, stride, own)
            if _ALIGNED[key][1] is not None:
                break
    return _ALIGNED[key]


def stages(backbone: nn.Module, image: Tensor) -> list[Tensor]:
    """All stages of a backbone of ``create_backbone`` as [B, C, h, w], also of timm models with channels last.

    Raises ValueError where it does not take pictures of that size; the message says which sizes it takes.
    """
    try:
        return _maps(backbone, image)
    except (AssertionError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "must match the size" not in str(error):
            raise
        raise ValueError(_misfit(backbone, image.shape[-2:], error)) from error


def embed(backbone: nn.Module, image: Tensor) -> Tensor:
    """Mean over the last feature map of a picture, resized to its exact sides as in ``ERCN``.

    Args:
        backbone: of ``create_backbone``.
        image: [B, 3, H, W].

    Returns:
        [B, D].

    Raises:
        ValueError: pictures of a size that the backbone does not take; the message says which sizes it takes.
    """
    image = resize_exactly(image, backbone.feature_info.reduction()[-1], backbone.align_corners)
    return stages(backbone, image)[-1].mean((2, 3))


def check_side(network: nn.Module, side: int, **arguments: Any) -> None:
    """Raises ValueError where the network's ``backbone`` is built for another picture size; computes nothing.

    arguments: further arguments of ``network``.
    """
    if network.backbone.img_size is None:
        return
    training = network.training
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            network.eval()(torch.zeros(1, 3, side, side), **arguments)
    finally:
        network.train(training)


def _maps(backbone: nn.Module, image: Tensor) -> list[Tensor]:
    maps = backbone(image)
    return [x.permute(0, 3, 1, 2) for x in maps] if getattr(backbone, "output_fmt", None) == "NHWC" else list(maps)


def _misfit(backbone: nn.Module, size: Sequence[int], error: Exception) -> str:
    """The sentence that pictures of ``size`` do not fit, and what makes them fit."""
    name, stride = backbone.pretrained_cfg["architecture"], backbone.feature_info.reduction()[-1]
    takes, ways, built = _arguments(name), [], getattr(backbone, "img_size", None)
    if built:
        height, width = built
        fits = f"as it is built, it takes {height} x {width} px"
        ways.append(f"pictures of that size (data.image_size {height})")
    else:
        fits = f"it takes sides that are multiples of {stride}"
    if "img_size" in takes:
        exact = [max(1, round(side / stride)) * stride for side in size]
        ways.append(f'backbone_kwargs {{"img_size": {exact[0] if exact[0] == exact[1] else exact}}}')
    if built and (free := [key for key in _FREE_SIZE if key in takes]):
        ways.append(f"{json.dumps({free[0]: _FREE_SIZE[free[0]]})} for all sides that are multiples of {stride}")
    return (
        f"backbone '{name}' does not take pictures of {size[0]} x {size[1]} px ({_first_line(error)}); {fits}"
        f"{': give ' if ways else ''}{', or '.join(ways)}"
    )


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


def channel_probabilities(logits: Tensor, config: ModelConfig) -> Tensor:
    """Probability of every foreground channel, [B, F]: sigmoid of its logit; with "onehot", of its grade."""
    if config.targets == "onehot":
        return grade_probabilities(logits, config)[:, 1:]
    return full(logits).sigmoid()


def dilations(side: int, reach: float) -> list[int]:
    """Distances for ``PixelAdaptiveRefinement`` at ``side`` pixels: the powers of 2 up to reach · side, and the latter.

    >>> dilations(161, 0.3)
    [1, 2, 4, 8, 16, 32, 48]
    """
    most = max(1, round(reach * side))
    return sorted({*(2**k for k in range(most.bit_length()) if 2**k <= most), most})


def activation(cam: Tensor, cam_pool: str) -> Tensor:
    """The non-negative evidence in a CAM: softplus where its pooling takes softplus, else the positive part."""
    return F.softplus(cam) if cam_pool in ("softplus", "gem") else cam.relu()


def grade_probabilities(logits: Tensor, config: ModelConfig) -> Tensor:
    """Probabilities of the grades (of "not referable, referable" for referable targets) from logits.

    ordinal: sigmoid(logit_k) estimates P(grade >= k); a running minimum over k makes it monotone, differences give
    P(grade = k). onehot: softmax over [0, logits]. referable: [1 - p, p].

    Args:
        logits: [B, F].

    Returns:
        [B, K], K = 2 for referable; at least float32, rows sum to 1.
    """
    logits = full(logits)
    if config.targets == "onehot":
        return F.pad(logits, (1, 0)).softmax(1)
    at_least = logits.sigmoid().cummin(1).values  # [B, F]
    at_least = F.pad(F.pad(at_least, (1, 0), value=1.0), (0, 1))  # P(grade >= 0) = 1, P(grade >= K) = 0
    return at_least[:, :-1] - at_least[:, 1:]
