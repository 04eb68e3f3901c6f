"""Configuration of every command, as frozen dataclasses: the command line, YAML files and Python calls share them.

Importing this file needs only the standard library. The command line takes the help of an option from the docstring's
``Args:``; the annotation of a number holds its range. ``preset(name)`` reads a packaged YAML file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from importlib import resources
from numbers import Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Targets = Literal["ordinal", "onehot", "referable"]
Dataset = Literal[
    "phantom", "eyepacs", "davis", "aptos", "messidor2", "idrid", "idrid_segmentation", "ddr", "ddr_segmentation",
    "fgadr", "rldr", "csv",
]  # fmt: skip


@dataclass(frozen=True)
class Range:
    """The valid numbers of a field: ``low`` to ``high``, both included but for the end that ``open`` names."""

    low: float
    high: float = math.inf
    open: Literal["neither", "low", "high"] = "neither"

    def __contains__(self, x: float) -> bool:
        return (x > self.low if self.open == "low" else x >= self.low) and (
            x < self.high if self.open == "high" else x <= self.high
        )

    def __str__(self) -> str:
        low = f"{'above' if self.open == 'low' else 'at least'} {self.low}"
        high = f" and {'below' if self.open == 'high' else 'at most'} {self.high}"
        return low if self.high == math.inf else low + high


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
ImageSize = Annotated[int, Range(32)]
PositiveFloat = Annotated[float, Range(0, open="low")]
NonNegativeFloat = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1, "low")]
Probability = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, "high")]


@cache
def _ranges(cls: type) -> dict[str, tuple[Range, Any]]:
    """Range and annotation of each field that has a range."""
    ranges = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        for part in (hint, *get_args(hint)):  # X itself, of tuple[X, ...], of X | None
            if get_origin(part) is Annotated:
                ranges[name] = part.__metadata__[0], hint
    return ranges


@dataclass(frozen=True)
class Config:
    """Base of the configurations. ValueError names the first field that is out of its range."""

    def __post_init__(self) -> None:
        for name, (limits, hint) in _ranges(type(self)).items():
            value = getattr(self, name)
            if value is None and NoneType in get_args(hint):
                continue
            several = get_origin(hint) is tuple
            if several and not isinstance(value, tuple):
                raise ValueError(f"{name} must be a tuple of numbers {limits}; got {value!r}")
            for entry in value if several else (value,):
                if not isinstance(entry, Real):
                    raise ValueError(f"{name} must be a number {limits}; got {value!r}")  # noqa: TRY004
                if entry not in limits:
                    raise ValueError(f"{name} must be {limits}; got {value!r}")


def _require_scale_1(scales: tuple[float, ...]) -> None:
    if 1 not in scales:
        raise ValueError(f"scales must have 1, the size from which the grades are; got {scales!r}")


@dataclass(frozen=True)
class ModelConfig(Config):
    """The ERCN network. Where the paper's text is not public, a field is our reading and names the other readings.

    Args:
        backbone: any timm model that supports ``features_only``.
        pretrained: what the backbone starts from. false: random weights; true: timm's (needs network or a local cache);
            a path: a run of ``ercn pretrain`` or ``ercn train``, or a file of weights, .safetensors or .pth, in timm's,
            torchvision's or RETFound's layout (``ercn.pretrained``).
        backbone_kwargs: further arguments of ``timm.create_model``, such as {"img_size": 512} where a network takes
            pictures of one size only, or {"dynamic_img_size": true}.
        num_grades: K; grade 0 is background, grades 1 … K-1 are foreground.
        targets: "ordinal" (channel k says grade ≥ k), "onehot" (channel k says grade = k) or "referable" (grade ≥ 2).
        output_stride: input pixels per CAM element, 8, 16 or 32; for a ViT, the size of its patches.
        patch: 0 makes every element of the feature map an instance. P > 0 is patch-level MIL: the picture is cut into
            P × P px patches, the backbone encodes each of them separately, and their embeddings are the elements. P is
            a multiple of output_stride.
        cam_pool: how the CAM c over N elements gives picture logits: pooled, times cam_scale, plus a learned prior.
            "relu": mean of the positive part. Only evidence for a grade counts, so a healthy picture needs an empty
            map; where the CAM is nowhere positive there is no gradient. The next four have a gradient everywhere.
            "softplus": mean of log(1 + e^c). "gem": generalised mean (mean of log(1 + e^c)^3)^(1/3) (Radenovic et al.
            2018). "lse": log of the mean of e^c (Pinheiro and Collobert 2015). "topk": mean of the largest tenth.
            "linear": the mean, without prior (SEAM, Chikontwe).
        cam_scale: factor of the pooled value. A mean over all elements dilutes a lesion by its share of the picture.
        evidence: what the MIL head classifies, with attention a over the elements i, features h and CAM c_k = w_k · h.
            "shared": logit_k = Σ a_i c_ki + b_k, attention weighs the CAM. "classwise": the same with an attention a_k
            for every channel (multi-branch attention, Lu et al. 2021, CLAM). "additive": c_i = ψ(N a_i h_i), logit =
            mean of c + b, where ψ has a hidden layer of pool_dim (Javed et al. 2022, Additive MIL). "separate":
            logit_k = u_k · Σ a_i h_i + b_k, with a classifier of its own (Ilse et al. 2018).
        embed_dim: D, channels of the pixel embedding (SEAM: 192).
        center: subtract the picture's mean from the embedding before the affinity (``ercn.nn.PixelCorrelation``); SEAM
            and Chikontwe do not.
        confidence: scale of the CAMs that the mask judges and the refinement works on. "relative": each CAM is divided
            by its own maximum in the picture, and each element keeps only its largest (SEAM, Chikontwe). Noise of a
            healthy eye then is as strong as a lesion, and ordinal targets, whose classes contain each other, conflict.
            "absolute": each CAM is divided by its own maximum and multiplied by the probability of its channel.
        mask: spatial mask on the CAM before refinement: "soft", "hard" or "off".
        mask_thresholds: the mask is the mean over these t of [max foreground CAM >= t].
        refinement: what refines the masked CAM, in this order. "affinity": pixel affinity of embeddings; of random
            projections of features and picture where no loss trains the embedding (ecr, min_pool, er of one view, H
            without detach_refined). "pamr": ``ercn.nn.PixelAdaptiveRefinement`` at the picture's resolution; it has no
            parameters and is left out in training. An empty list leaves the map as the mask made it.
        steps: how often the normalised affinity is applied.
        pamr_steps: how often "pamr" is applied.
        pamr_reach: distance of the farthest neighbour of "pamr", as a share of the picture's side.
        refine_stride: input pixels per element where the affinity is computed, a divisor of output_stride; 0 for the
            CAM's own grid.
        refine_stages: the two stages of the backbone that the affinity embeds beside the picture. 0 is the finest, -1
            the last. In a ViT, blocks, by default its last three (backbone_kwargs {"out_indices": [2, 5, 8, 11]} names
            others).
        detach: stop gradients into the refinement's CAM and features (SEAM and Chikontwe do).
        pool: "gated" or "plain" attention MIL over all feature-map elements, or "none" (CAM only).
        pool_dim: L, hidden width of the attention.
        fusion: logits are the mean of CAM and MIL logits ("mean"), or one of them ("cam", "mil").
        dropout: share of the last feature map that is dropped before the classifier.
    """

    backbone: str = "resnet50"
    pretrained: bool | str = False
    backbone_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    num_grades: int = 5
    targets: Targets = "ordinal"
    output_stride: PositiveInt = 16
    patch: NonNegativeInt = 0
    cam_pool: Literal["relu", "softplus", "gem", "lse", "topk", "linear"] = "lse"
    cam_scale: PositiveFloat = 1.0
    evidence: Literal["shared", "classwise", "additive", "separate"] = "shared"
    embed_dim: PositiveInt = 192
    center: bool = True
    confidence: Literal["absolute", "relative"] = "absolute"
    mask: Literal["soft", "hard", "off"] = "soft"
    mask_thresholds: tuple[Probability, ...] = (0.2, 0.3, 0.4)
    refinement: tuple[Literal["affinity", "pamr"], ...] = ("affinity", "pamr")
    steps: PositiveInt = 1
    pamr_steps: PositiveInt = 20
    pamr_reach: PositiveFloat = 0.3
    refine_stride: NonNegativeInt = 0
    refine_stages: tuple[int, int] = (-3, -2)
    detach: bool = True
    pool: Literal["gated", "plain", "none"] = "gated"
    pool_dim: PositiveInt = 128
    fusion: Literal["mean", "cam", "mil"] = "mean"
    dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained == "":
            raise ValueError("pretrained must be true, false or a path; got ''")
        if self.refine_stride and self.output_stride % self.refine_stride:
            raise ValueError(
                f"refine_stride must divide output_stride {self.output_stride}, or be 0; got {self.refine_stride}"
            )
        if not self.mask_thresholds:
            raise ValueError("mask_thresholds must have at least one entry; got ()")


@dataclass(frozen=True)
class LossConfig(Config):
    """Weights of L = cls·L_cls + er·L_ER + ecr·L_ECR + consistency·H + min_pool·L_min; 0 leaves a term out.

    Args:
        cls: weight of the classification loss.
        er: weight of the equivariance loss. An empty map is equivariant too: at 1, SEAM's value (SEAM's mean over 20
            classes makes the term small), the CAM can fade away while a MIL head with its own evidence classifies.
        ecr: weight of the equivariant cross loss.
        consistency: weight of H, CAM against refined CAM.
        min_pool: weight of the min-pooling loss.
        transform: the map A between the two views: "rescale", "flip", "rot90", "translate", "affine", "all" or "none"
            (one view). SEAM rescales; lesions of a few pixels do not survive that.
        rescale: factor of "rescale" (SEAM: 0.3).
        consistency_eps: added to the CAM under the logarithm of H. With Chikontwe's 1e-10, an element whose CAM is near
            0 sends a gradient of up to 1e10, and after clipping the step teaches nothing else.
        scale_refined: compare the refined CAM scaled to its own range, as SEAM and Chikontwe do, or as it is, in
            [0, 1]. Scaling blows up what is nearly flat, and the embedding learns affinities that level the map.
        detach_refined: stop the gradient of H into the refined CAM, so that the CAM learns the refined CAM as a target.
            Chikontwe does not stop it, and H then falls fastest where the refined CAM fades away.
        hard_fraction: share of hardest values that L_ECR averages (SEAM: 0.2).
        warmup_epochs: epochs over which the weights of all terms but L_cls rise from 0.
    """

    cls: NonNegativeFloat = 1.0
    er: NonNegativeFloat = 0.1
    ecr: NonNegativeFloat = 0.0
    consistency: NonNegativeFloat = 0.0
    min_pool: NonNegativeFloat = 0.0
    transform: Literal["rescale", "flip", "rot90", "translate", "affine", "all", "none"] = "flip"
    rescale: Share = 0.3
    consistency_eps: Share = 0.1
    scale_refined: bool = False
    detach_refined: bool = True
    hard_fraction: Share = 0.2
    warmup_epochs: NonNegativeInt = 4


@dataclass(frozen=True)
class DataConfig(Config):
    """A folder written by ``ercn prepare`` and how to feed it.

    Args:
        root: that folder.
        image_size: side of the square pictures that the network gets, in pixels. A multiple of 32 and one more is best:
            pictures of other sides are resized again, to a side at which the maps are symmetric (``ercn.elements``).
            With ``model.patch`` it must be a multiple of that.
        batch_size: pictures per step and device.
        workers: loader processes.
        augment: flips, rotation, colour and scale jitter in training.
        label_fraction: share of the training patients whose labels are used, stratified by their worst grade and drawn
            by the run's seed; at least one patient of every grade. A smaller share is a part of a larger one.
            Pre-training reads all pictures.
        balance: "none", "weights" (class weights in L_cls) or "sampler" (balanced sampling); never both.
        max_unreadable: unreadable pictures that a run skips, by name, before it stops; with several devices, each one
            counts its own pictures.
    """

    root: str = ""
    image_size: ImageSize = 513
    batch_size: PositiveInt = 8
    workers: NonNegativeInt = 2
    augment: bool = True
    label_fraction: Share = 1.0
    balance: Literal["none", "weights", "sampler"] = "none"
    max_unreadable: NonNegativeInt = 10


@dataclass(frozen=True)
class RunConfig(Config):
    """What every training run shares.

    Args:
        out: the run's folder.
        resume: go on from its last checkpoint.
        seed: the one root seed.
        epochs: passes over the training pictures.
        lr: AdamW's learning rate.
        weight_decay: AdamW's, of weights but not of biases.
        warmup_epochs: epochs over which the learning rate rises; then it falls as a cosine.
        accumulate: steps per optimizer update.
        clip: gradient norm limit, 0 for none.
        precision: Lightning's name ("32-true", "bf16-mixed", …).
        accelerator: "cpu", "gpu" or "cuda"; "auto" is CUDA where there is one, else the CPU.
        devices: devices per machine, as in Lightning.
        num_nodes: machines, as in Lightning.
        channels_last: memory layout of pictures and weights.
        grad_checkpointing: recompute the backbone's blocks in the backward pass: less memory, the same results.
        compile: torch.compile of the network.
        sync_batchnorm: batch statistics over all GPUs instead of each one's own.
        freeze_batchnorm: leave BatchNorm as ``init`` or ``model.pretrained`` has it, statistics and weights (SEAM).
        ema: decay of the weights' exponential moving average, which then is validated and exported; 0 for none.
        progress: a progress bar where the output is a terminal.
    """

    out: str = "runs/ercn"
    resume: bool = False
    seed: NonNegativeInt = 0
    epochs: PositiveInt = 20
    lr: NonNegativeFloat = 1e-3
    weight_decay: NonNegativeFloat = 1e-4
    warmup_epochs: NonNegativeInt = 1
    accumulate: PositiveInt = 1
    clip: NonNegativeFloat = 1.0
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    channels_last: bool = True
    grad_checkpointing: bool = False
    compile: bool = False
    sync_batchnorm: bool = False
    freeze_batchnorm: bool = False
    ema: Decay = 0.0
    progress: bool = True


@dataclass(frozen=True)
class PretrainConfig(Config):
    """``ercn pretrain``: contrastive learning of the backbone without labels.

    On small sets prefer SimCLR. After 6 epochs on 360 pictures of an earlier phantom at 97 px in batches of 20
    (``test_resnet``, 3 seeds) validation kappa of kNN and linear probe is 0.81 and 0.86 for SimCLR (lr 0.003) and 0.69
    and 0.83 for MoCo v2 (temperature 0.2, lr 0.001); 0.20 and 0.74 untrained. MoCo v2 needs many steps, so small
    batches, and a learning rate at which keys do not age (0.002 and 0.003 were worse). Its steps take 0.7 of SimCLR's
    time. Better features need not give a better grader: on the phantom of docs/ablation.md they did not.

    Args:
        backbone: any timm model that supports ``features_only``.
        backbone_kwargs: further arguments of ``timm.create_model``, as in ``ModelConfig``.
        output_stride: input pixels per element of the backbone's last stage.
        method: "simclr" (NT-Xent) or "moco_v2" (momentum encoder and queue). ``init`` of ``TrainConfig`` loads the
            exported backbone.
        temperature: of the contrastive loss (SimCLR: 0.5, MoCo v2: 0.2).
        projection_dim: width of the embedding that the loss compares.
        queue_size: moco_v2 only, keys of earlier batches kept as negatives beside the batch's own; at most those of an
            eighth of the training pictures, since older keys come from a network that has changed.
        momentum: moco_v2 only, of the momentum encoder; none for 1 - 10 / steps of the run, at least 0 and at most
            0.999, so that the encoder follows within a tenth of the run, even of a short one.
        probe_every: epochs between two measurements of the features by k nearest neighbours and a linear probe, with
            the grades of the train and val split; the last epoch is always measured. 0 for none.
    """

    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(out="runs/pretrain"))
    backbone: str = "resnet50"
    backbone_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    output_stride: PositiveInt = 32
    method: Literal["simclr", "moco_v2"] = "simclr"
    temperature: PositiveFloat = 0.5
    projection_dim: PositiveInt = 128
    queue_size: PositiveInt = 4096
    momentum: Probability | None = None
    probe_every: NonNegativeInt = 1


@dataclass(frozen=True)
class CeilingConfig(Config):
    """``ercn ceiling``: a U-Net that is trained on lesion masks, the ceiling of maps from grades alone.

    It uses all masks: ``data.label_fraction`` and ``data.balance`` are not read.

    Args:
        width: channels at the picture's own resolution, doubled by each of three halvings.
    """

    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(out="runs/ceiling", epochs=30, lr=5e-3))
    width: PositiveInt = 16


@dataclass(frozen=True)
class TrainConfig(Config):
    """``ercn train``: a network on image labels.

    Args:
        init: the run folder of ``ercn pretrain`` whose backbone to start from, or none. It is read as
            ``model.pretrained`` is, and given instead of it.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    run: RunConfig = field(default_factory=RunConfig)
    init: str | None = None


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """``ercn plan``: what ``ercn train`` with these options needs.

    Args:
        init: not read.
        memory: of the device, in GB, or none for what is found here.
    """

    memory: float | None = None


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """``ercn evaluate``: metrics of a trained run on one split.

    Args:
        run: folder of ``ercn train``.
        data: prepared folder, or none for the folder of the training.
        split: which pictures.
        batch_size: pictures per forward pass.
        workers: loader processes.
        scales: sizes, relative to the training's, at which the maps are computed and averaged (SEAM: 0.5, 1, 1.5, 2).
            1 must be one of them: the grades are from it alone.
        flip: average the maps with those of mirrored pictures too.
        bootstrap: draws over patients.
        seed: of the bootstrap.
        ceiling: run folder of a U-Net that was trained on masks, whose maps are measured beside the model's; or none.
        accelerator: "cpu", "gpu" or "cuda"; "auto" is CUDA where there is one, else the CPU.
        progress: a progress bar where the output is a terminal.
    """

    run: str = "runs/ercn"
    data: str | None = None
    split: Literal["train", "val", "test", "all"] = "test"
    batch_size: PositiveInt = 8
    workers: NonNegativeInt = 2
    scales: tuple[PositiveFloat, ...] = (1.0,)
    flip: bool = False
    bootstrap: NonNegativeInt = 2000
    seed: NonNegativeInt = 0
    ceiling: str = ""
    accelerator: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_scale_1(self.scales)


@dataclass(frozen=True)
class AblateConfig(Config):
    """``ercn ablate``: a grid of training configurations times seeds, and one table of what each part brings.

    Args:
        grid: a YAML file (``ercn.ablation.grid``), or "phantom", the packaged one of ``docs/ablation.md``.
        out: folder of cells, table and figure. Started again, the command goes on; started several times at once on one
            folder, as with one GPU each, the processes share the cells.
        bootstrap: draws over patients.
    """

    grid: str = "phantom"
    out: str = "runs/ablation"
    bootstrap: PositiveInt = 2000


@dataclass(frozen=True)
class SelectConfig(AblateConfig):
    """``ercn select``: the best row of a grid, chosen on the validation split over at least 5 seeds.

    Args:
        grid: a YAML file whose ``choose`` says by what, or "select", the packaged one that chose the defaults.
        out: folder of cells and choice; ``ercn ablate`` may share it. Started again, the command goes on; started
            several times at once on one folder, the processes share the cells.
        bootstrap: draws over patients.
    """

    grid: str = "select"
    out: str = "runs/selection"


@dataclass(frozen=True)
class PredictConfig(Config):
    """``ercn predict``: grades and heat maps of any pictures.

    Args:
        run: folder of ``ercn train``.
        input: a picture or a folder of pictures.
        out: folder for ``predictions.csv`` and overlays.
        overlays: which maps to draw at the original picture's full resolution.
        batch_size: pictures per forward pass.
        workers: loader processes.
        scales: sizes, relative to the training's, at which the maps are computed and averaged (SEAM: 0.5, 1, 1.5, 2).
            1 must be one of them: the grades are from it alone.
        flip: average the maps with those of mirrored pictures too.
        max_unreadable: unreadable pictures that are skipped, by name, before the command stops.
        max_pixels: a picture counts as unreadable where the square of its longer side is larger.
        accelerator: "cpu", "gpu" or "cuda"; "auto" is CUDA where there is one, else the CPU.
        progress: a progress bar where the output is a terminal.
    """

    run: str = "runs/ercn"
    input: str = ""
    out: str = "runs/predictions"
    overlays: tuple[str, ...] = ("cam", "refined_cam", "attention")
    batch_size: PositiveInt = 8
    workers: NonNegativeInt = 2
    scales: tuple[PositiveFloat, ...] = (1.0,)
    flip: bool = False
    max_unreadable: NonNegativeInt = 10
    max_pixels: PositiveInt = 200_000_000
    accelerator: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_scale_1(self.scales)


@dataclass(frozen=True)
class ExportConfig(Config):
    """``ercn export``: the network for programs without ``ercn``, with a script that predicts.

    Args:
        run: folder of ``ercn train``.
        format: "onnx" for ONNX Runtime; "pt2" for ``torch.export.load``; "aoti", compiled by AOTInductor for the
            processor of this machine, for C++ without Python.
        out: a new or empty folder.
    """

    run: str = "runs/ercn"
    format: Literal["onnx", "pt2", "aoti"] = "onnx"
    out: str = "runs/exported"


@dataclass(frozen=True)
class ReportConfig(Config):
    """``ercn report RUN …``: one page that compares runs.

    Args:
        runs: folders of ``ercn train``.
        out: the HTML file to write.
    """

    runs: tuple[str, ...] = ()
    out: str = "report.html"


@dataclass(frozen=True)
class PrepareConfig(Config):
    """``ercn prepare``: find the fundus disc, crop, resize and cache a data set, and save its splits.

    Args:
        dataset: "phantom", or the published data set.
        root: folder of the data set in its published layout; for csv, the file. The phantom has none.
        out: the cache.
        size: side of the cached pictures.
        label: which label column, where the data set has several; empty for the first. "one_figure" or "concatenated"
            (davis), "dr" or "dme" (messidor2, idrid), "ours" or "kaggle" (rldr), the column's name (csv, first
            "label").
        normalize: "none" keeps the pictures; "graham" subtracts the local mean color (Graham 2015), "local" that of a
            wider neighbourhood, from the cached pictures (``ercn.data.normalization``).
        fractions: train, val, test by patient; a split that the publishers made is kept.
        exclude: a prepared folder of pictures from the same source, whose patients are left out.
        patients: phantom only, how many.
        difficulty: phantom only. The harder, the fainter are the lesions, the more look-alikes there are, and the worse
            is the camera.
        seed: of splits and phantom.
        workers: processes that read pictures.
        max_unreadable: unreadable or missing pictures that are skipped, by name, before the command stops.
        max_pixels: a picture counts as unreadable where the square of its longer side is larger.
        progress: a progress bar where the output is a terminal.
    """

    dataset: Dataset = "phantom"
    root: str = ""
    out: str = "runs/data"
    size: ImageSize = 513
    label: str = ""
    normalize: Literal["none", "graham", "local"] = "none"
    fractions: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (0.7, 0.1, 0.2)
    exclude: str = ""
    patients: NonNegativeInt = 200
    difficulty: Literal["easy", "standard", "hard"] = "standard"
    seed: NonNegativeInt = 0
    workers: NonNegativeInt = 2
    max_unreadable: NonNegativeInt = 10
    max_pixels: PositiveInt = 200_000_000
    progress: bool = True


T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """A configuration from nested mappings, as YAML and JSON hold it; the inverse of ``dataclasses.asdict``.

    Fields that are not given keep their defaults, lists become tuples, integers stand for floats. ValueError names the
    key (``model.pool``, after ``path``) and the keys or values that are valid, types and ranges.
    """
    if not isinstance(values, Mapping):
        what = path or cls.__name__
        raise ValueError(f"{what} must be a mapping of {cls.__name__}'s fields; got {values!r}")  # noqa: TRY004
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key {_join(path, key)}; {cls.__name__} has {', '.join(known)}")
    hints = get_type_hints(cls)
    checked = {key: _check(hints[key], value, _join(path, key)) for key, value in values.items()}
    try:
        return cls(**checked)
    except ValueError as error:  # of __post_init__, which begins with the field's name
        raise ValueError(_join(path, error)) from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, the keys joined with dots as the command line's options are: ``data.root``."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        key = _join(prefix, name)
        result.update(flatten(value, key) if isinstance(value, Mapping) else {key: value})
    return result


def preset(name: str) -> TrainConfig:
    """A packaged recipe: "ercn", "seam" or "chikontwe" (``ercn/configs``). ValueError lists the names; needs PyYAML."""
    folder = resources.files("ercn") / "configs"
    names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    if name not in names:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(names)}")
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("presets need PyYAML: pip install 'ercn[train]'", name=error.name) from error
    return from_dict(TrainConfig, yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")))


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _check(hint: Any, value: Any, path: str) -> Any:
    """``value`` as the annotation ``hint`` wants it, or ValueError."""
    origin, options = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, path)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{path} must be one of {', '.join(map(repr, options))}; got {value!r}")
        return value
    if origin in (Union, UnionType):  # X | None, bool | str; Annotated[X, …] | None is a Union
        if type(value) in options:
            return value
        if NoneType in options:
            return _check(options[0], value, path)
        raise ValueError(f"{path} must be {' or '.join(option.__name__ for option in options)}; got {value!r}")
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{path} must be a mapping of names; got {value!r}")
        return dict(value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{path} must be a list; got {value!r}")
        hints = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        if len(value) != len(hints):
            raise ValueError(f"{path} must have {len(hints)} entries; got {value!r}")
        return tuple(_check(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(hints, value)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{path} must be {hint.__name__}; got {value!r}")
    return value
