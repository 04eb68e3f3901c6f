"""Configuration of every command, as frozen dataclasses: the command line, YAML files and Python calls share them.

Importing this file needs nothing outside the standard library. ``preset(name)`` reads a packaged YAML file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Targets = Literal["ordinal", "onehot", "referable"]
Dataset = Literal[
    "phantom",
    "eyepacs",
    "davis",
    "aptos",
    "messidor2",
    "idrid",
    "idrid_segmentation",
    "ddr",
    "ddr_segmentation",
    "fgadr",
    "rldr",
    "csv",
]

_RULES: dict[str, Callable[[float], bool]] = {
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "at least 32": lambda x: x >= 32,
    "above 0": lambda x: x > 0,
    "above 0 and at most 1": lambda x: 0 < x <= 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "at least 0 and at most 1": lambda x: 0 <= x <= 1,
}


def _require(config: Any, rule: str, *names: str) -> None:
    """ValueError naming the first of the fields that breaks the rule; in a tuple every entry must keep it."""
    for name in names:
        value = getattr(config, name)
        if not all(map(_RULES[rule], value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} must be {rule}; got {value!r}")


def _require_scales(config: Any) -> None:
    _require(config, "above 0", "scales")
    if 1 not in config.scales:
        raise ValueError(f"scales must have 1, the size from which the grades are; got {config.scales!r}")


@dataclass(frozen=True)
class ModelConfig:
    """The ERCN network. Where the paper's text is not public, the field is our reading and says what else it can be.

    backbone: any timm model that supports ``features_only``.
    pretrained: what the backbone starts from. false: random weights; true: timm's (needs network or a local cache); a
        path: a run of ``ercn pretrain`` or ``ercn train``, or a file of weights, .safetensors or .pth, in timm's,
        torchvision's or RETFound's layout (``ercn.pretrained``).
    backbone_kwargs: further arguments of ``timm.create_model``, for one {"img_size": 512} where a network takes one
        size of pictures only, or {"dynamic_img_size": true}.
    num_grades: K; grade 0 is background, grades 1 … K-1 are foreground.
    targets: "ordinal" (channel k says grade ≥ k), "onehot" (channel k says grade = k) or "referable" (grade ≥ 2).
    output_stride: input pixels per CAM element, 8, 16 or 32; of a ViT, the size of its patches.
    patch: 0 makes every element of the feature map an instance. P > 0 is patch-level MIL: the picture is cut into P × P
        px patches, the backbone encodes each on its own, and their embeddings are the elements; P a multiple of
        output_stride.
    cam_pool: picture logits from the CAM c over its N elements, times cam_scale, plus a learned prior.
        "relu": mean of its positive part, so that only evidence for a grade counts and a healthy picture needs an empty
        map; no gradient where it is nowhere positive. With one everywhere: "softplus": mean of log(1 + e^c); "gem": the
        generalised mean (mean of log(1 + e^c)^3)^(1/3) (Radenovic et al. 2018); "lse": log of the mean of e^c (Pinheiro
        and Collobert 2015); "topk": mean of the largest tenth. "linear": the mean, without prior (SEAM, Chikontwe).
    cam_scale: factor of what is pooled. A mean over all elements dilutes a lesion by its share of the picture.
    evidence: what the MIL head classifies, with attention a over the elements i, features h and CAM c_k = w_k · h.
        "shared": logit_k = Σ a_i c_ki + b_k, the CAM is the evidence that attention weighs; "classwise": the same with
        an attention a_k for every channel (multi-branch attention, Lu et al. 2021, CLAM); "additive": c_i = ψ(N a_i
        h_i), logit = mean of c + b, ψ a hidden layer of pool_dim (Javed et al. 2022, Additive MIL); "separate":
        logit_k = u_k · Σ a_i h_i + b_k, with a classifier of its own (Ilse et al. 2018).
    embed_dim: D, channels of the pixel embedding (SEAM: 192).
    center: subtract the picture's mean from the embedding before the affinity (``ercn.nn.PixelCorrelation``); SEAM and
        Chikontwe do not.
    confidence: what the mask judges and the refinement works on: "relative", each CAM by its own maximum in the picture
        and of every element only the largest (SEAM, Chikontwe), which makes noise of a healthy eye as strong as a
        lesion, and is at odds with ordinal targets, whose classes contain each other; "absolute", each CAM by its own
        maximum, times the probability of its channel.
    mask: spatial mask on the CAM before refinement: "soft", "hard" or "off".
    mask_thresholds: the mask is the mean over these t of [max foreground CAM >= t].
    refinement: what is done to the masked CAM, in this order. "affinity": the pixel affinity of embeddings, random
        projections of features and picture where no loss teaches them (ecr, min_pool, er of one view, H without
        detach_refined); "pamr": ``ercn.nn.PixelAdaptiveRefinement`` at the picture's resolution, which has no
        parameters and is left out while training. Nothing leaves the map as the mask made it.
    steps: how often the normalised affinity is applied.
    pamr_steps: the same of "pamr". pamr_reach: its farthest neighbour, as a share of the picture's side.
    refine_stride: input pixels per element where the affinity is computed, a divisor of output_stride; 0 for the CAM's
        own grid.
    refine_stages: of the backbone, what the affinity embeds beside the picture, two of them: 0 is the finest, -1 the
        last; of a ViT, blocks, by default its last three (backbone_kwargs {"out_indices": [2, 5, 8, 11]} names others).
    detach: stop gradients into the refinement's CAM and features (SEAM and Chikontwe do).
    pool: "gated" or "plain" attention MIL over all feature-map elements, or "none" (CAM only).
    pool_dim: L, hidden width of the attention.
    fusion: logits are the mean of CAM and MIL logits ("mean"), or one of them ("cam", "mil").
    dropout: on the last feature map, before the classifier.
    """

    backbone: str = "resnet50"
    pretrained: bool | str = False
    backbone_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    num_grades: int = 5
    targets: Targets = "ordinal"
    output_stride: int = 16
    patch: int = 0
    cam_pool: Literal["relu", "softplus", "gem", "lse", "topk", "linear"] = "lse"
    cam_scale: float = 1.0
    evidence: Literal["shared", "classwise", "additive", "separate"] = "shared"
    embed_dim: int = 192
    center: bool = True
    confidence: Literal["absolute", "relative"] = "absolute"
    mask: Literal["soft", "hard", "off"] = "soft"
    mask_thresholds: tuple[float, ...] = (0.2, 0.3, 0.4)
    refinement: tuple[Literal["affinity", "pamr"], ...] = ("affinity", "pamr")
    steps: int = 1
    pamr_steps: int = 20
    pamr_reach: float = 0.3
    refine_stride: int = 0
    refine_stages: tuple[int, int] = (-3, -2)
    detach: bool = True
    pool: Literal["gated", "plain", "none"] = "gated"
    pool_dim: int = 128
    fusion: Literal["mean", "cam", "mil"] = "mean"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.pretrained == "":
            raise ValueError("pretrained must be true, false or a path; got ''")
        _require(self, "at least 1", "output_stride", "embed_dim", "pool_dim", "steps", "pamr_steps")
        _require(self, "at least 0", "patch", "refine_stride")
        _require(self, "above 0", "cam_scale", "pamr_reach")
        if self.refine_stride and self.output_stride % self.refine_stride:
            raise ValueError(
                f"refine_stride must divide output_stride {self.output_stride}, or be 0; got {self.refine_stride}"
            )
        _require(self, "at least 0 and at most 1", "dropout", "mask_thresholds")
        if not self.mask_thresholds:
            raise ValueError("mask_thresholds must have at least one entry; got ()")


@dataclass(frozen=True)
class LossConfig:
    """Weights of L = cls·L_cls + er·L_ER + ecr·L_ECR + consistency·H + min_pool·L_min; 0 leaves a term out.

    cls: weight of the classification loss.
    er: weight of the equivariance loss. An empty map is equivariant too: at 1, SEAM's (whose mean over 20 classes makes
        it small), the CAM can fade away while a MIL head with evidence of its own classifies.
    ecr: weight of the equivariant cross loss.
    consistency: weight of H, CAM against refined CAM. min_pool: weight of the min-pooling loss.
    transform: the map A between the two views: "rescale", "flip", "rot90", "translate", "affine", "all" or "none"
        (one view). SEAM rescales; lesions of a few pixels do not survive that.
    rescale: factor of "rescale" (SEAM: 0.3).
    consistency_eps: added to the CAM under the logarithm of H. Chikontwe's 1e-10 lets an element whose CAM is near 0
        send a gradient of up to 1e10, and the clipped step then teaches nothing else.
    scale_refined: compare the refined CAM scaled to its own range, as SEAM and Chikontwe do, or as it is, in [0, 1].
        Scaled, what is nearly flat is blown up, and the embedding learns affinities that level the map.
    detach_refined: stop the gradient of H into the refined CAM, which so is the target that the CAM learns; Chikontwe
        does not, and H then falls fastest where the refined CAM fades away.
    hard_fraction: share of hardest values that L_ECR averages (SEAM: 0.2).
    warmup_epochs: epochs over which the weights of all terms but L_cls rise from 0.
    """

    cls: float = 1.0
    er: float = 0.1
    ecr: float = 0.0
    consistency: float = 0.0
    min_pool: float = 0.0
    transform: Literal["rescale", "flip", "rot90", "translate", "affine", "all", "none"] = "flip"
    rescale: float = 0.3
    consistency_eps: float = 0.1
    scale_refined: bool = False
    detach_refined: bool = True
    hard_fraction: float = 0.2
    warmup_epochs: int = 4

    def __post_init__(self) -> None:
        _require(self, "at least 0", "cls", "er", "ecr", "consistency", "min_pool", "warmup_epochs")
        _require(self, "above 0 and at most 1", "rescale", "hard_fraction", "consistency_eps")


@dataclass(frozen=True)
class DataConfig:
    """A folder written by ``ercn prepare`` and how to feed it.

    root: that folder.
    image_size: side of the square pictures given to the network, in pixels. Best is a multiple of 32 and one more:
        other sides are resized once more, to one at which the maps are symmetric (``ercn.elements``). With
        ``model.patch`` it must be a multiple of that.
    batch_size: pictures per step and device.
    workers: loader processes.
    augment: flips, rotation, colour and scale jitter in training.
    label_fraction: share of the training patients whose labels are used, stratified by their worst grade and drawn by
        the run's seed; at least one patient of every grade. A smaller share is a part of a larger one. Pre-training
        reads all pictures.
    balance: "none", "weights" (class weights in L_cls) or "sampler" (balanced sampling); never both.
    max_unreadable: unreadable pictures that a run skips, by name, before it stops; with several devices each counts
        those of its own share.
    """

    root: str = ""
    image_size: int = 513
    batch_size: int = 8
    workers: int = 2
    augment: bool = True
    label_fraction: float = 1.0
    balance: Literal["none", "weights", "sampler"] = "none"
    max_unreadable: int = 10

    def __post_init__(self) -> None:
        _require(self, "at least 32", "image_size")
        _require(self, "at least 1", "batch_size")
        _require(self, "at least 0", "workers", "max_unreadable")
        _require(self, "above 0 and at most 1", "label_fraction")


@dataclass(frozen=True)
class RunConfig:
    """What every training run shares.

    out: the run's folder. resume: go on from its last checkpoint. seed: the one root seed.
    precision: Lightning's name ("32-true", "bf16-mixed", …).
    accelerator: "cpu", "gpu" or "cuda"; "auto" is CUDA where there is one, else the CPU.
    devices, num_nodes: as in Lightning.
    epochs: passes over the training pictures. lr: AdamW's learning rate.
    weight_decay: AdamW's, of weights but not of biases.
    warmup_epochs: epochs over which the learning rate rises; then it falls as a cosine.
    accumulate: steps per optimizer update. clip: gradient norm limit, 0 for none.
    channels_last: memory layout of pictures and weights.
    grad_checkpointing: recompute the backbone's blocks in the backward pass: less memory, the same results.
    compile: torch.compile of the network. sync_batchnorm: batch statistics over all GPUs instead of each one's own.
    freeze_batchnorm: leave BatchNorm as ``init`` or ``model.pretrained`` has it, statistics and weights (SEAM).
    ema: decay of the weights' exponential moving average, which then is validated and exported; 0 for none.
    progress: a progress bar where the output is a terminal.
    """

    out: str = "runs/ercn"
    resume: bool = False
    seed: int = 0
    epochs: int = 20
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup_epochs: int = 1
    accumulate: int = 1
    clip: float = 1.0
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    channels_last: bool = True
    grad_checkpointing: bool = False
    compile: bool = False
    sync_batchnorm: bool = False
    freeze_batchnorm: bool = False
    ema: float = 0.0
    progress: bool = True

    def __post_init__(self) -> None:
        _require(self, "at least 1", "epochs", "accumulate", "devices", "num_nodes")
        _require(self, "at least 0 and below 1", "ema")
        _require(self, "at least 0", "seed", "lr", "weight_decay", "warmup_epochs", "clip")


@dataclass(frozen=True)
class PretrainConfig:
    """``ercn pretrain``: contrastive learning of the backbone without labels.

    backbone: any timm model that supports ``features_only``. output_stride: input pixels per element of its last stage.
    backbone_kwargs: as of ``ModelConfig``.
    method: "simclr" (NT-Xent) or "moco_v2" (momentum encoder and queue). The exported backbone loads through
    ``init`` of ``TrainConfig``.
    On small sets prefer SimCLR. After 6 epochs on 360 pictures of an earlier phantom at 97 px in batches of 20
    (``test_resnet``, 3 seeds) validation kappa of kNN and linear probe is 0.81 and 0.86 for SimCLR (lr 0.003) and 0.69
    and 0.83 for MoCo v2 (temperature 0.2, lr 0.001); 0.20 and 0.74 untrained. MoCo v2 needs many steps, so small
    batches, and a learning rate at which keys do not age (0.002 and 0.003 were worse). Its steps take 0.7 of SimCLR's
    time. Whether what follows gains is another question: on the phantom of docs/ablation.md it did not.
    temperature: of the contrastive loss (SimCLR: 0.5, MoCo v2: 0.2).
    projection_dim: width of the embedding it compares.
    queue_size: moco_v2 only, keys of earlier batches kept as negatives beside the batch's own; at most those of an
        eighth of the training pictures, since older ones are of a network that has changed.
    momentum: moco_v2 only, of the momentum encoder; none for 1 - 10 / steps of the run, at least 0 and at most 0.999,
        so that the encoder follows within a tenth of the run, be it short.
    probe_every: epochs between two measurements of the features by k nearest neighbours and a linear probe, with the
        grades of the train and val split; the last epoch is always measured. 0 for none.
    """

    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(out="runs/pretrain"))
    backbone: str = "resnet50"
    backbone_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    output_stride: int = 32
    method: Literal["simclr", "moco_v2"] = "simclr"
    temperature: float = 0.5
    projection_dim: int = 128
    queue_size: int = 4096
    momentum: float | None = None
    probe_every: int = 1

    def __post_init__(self) -> None:
        _require(self, "above 0", "temperature")
        _require(self, "at least 0", "probe_every")
        _require(self, "at least 1", "output_stride", "projection_dim", "queue_size")
        if self.momentum is not None:
            _require(self, "at least 0 and at most 1", "momentum")


@dataclass(frozen=True)
class CeilingConfig:
    """``ercn ceiling``: a U-Net that is trained on lesion masks, the ceiling of maps from grades alone.

    Of ``data``, label_fraction and balance are not read: all masks are used. width: channels at the picture's own
    resolution, doubled by each of three halvings.
    """

    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(out="runs/ceiling", epochs=30, lr=5e-3))
    width: int = 16

    def __post_init__(self) -> None:
        _require(self, "at least 1", "width")


@dataclass(frozen=True)
class TrainConfig:
    """``ercn train``. init: the run folder of ``ercn pretrain`` whose backbone to start from, or none. It is read as
    ``model.pretrained`` is, and given instead of it."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    run: RunConfig = field(default_factory=RunConfig)
    init: str | None = None


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """``ercn plan``: what ``ercn train`` with these options needs.

    init: not read. memory: of the device, in GB, or none for what is found here.
    """

    memory: float | None = None


@dataclass(frozen=True)
class EvaluateConfig:
    """``ercn evaluate``: metrics of a trained run on one split.

    run: folder of ``ercn train``. data: prepared folder, or none for the one of the training.
    bootstrap: draws over patients.
    split: which pictures. batch_size: pictures per forward pass. workers: loader processes. seed: of the bootstrap.
    scales: sizes, relative to the training's, at which the maps are computed and averaged (SEAM: 0.5, 1, 1.5, 2);
        1 must be one of them, from which alone the grades are. flip: the maps' average has mirrored pictures too.
    ceiling: run folder of a U-Net that was trained on masks, whose maps are measured beside the model's; or none.
    accelerator: "cpu", "gpu" or "cuda"; "auto" is CUDA where there is one, else the CPU.
    progress: a progress bar where the output is a terminal.
    """

    run: str = "runs/ercn"
    data: str | None = None
    split: Literal["train", "val", "test", "all"] = "test"
    batch_size: int = 8
    workers: int = 2
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    bootstrap: int = 2000
    seed: int = 0
    ceiling: str = ""
    accelerator: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        _require(self, "at least 1", "batch_size")
        _require(self, "at least 0", "workers", "bootstrap", "seed")
        _require_scales(self)


@dataclass(frozen=True)
class AblateConfig:
    """``ercn ablate``: a grid of training configurations times seeds, and one table of what each part brings.

    grid: a YAML file (``ercn.ablation.grid``), or "phantom", the packaged one of ``docs/ablation.md``.
    out: folder of cells, table and figure. Started again, the command goes on; started several times at once on one
        folder, as with one GPU each, the processes share the cells.
    bootstrap: draws over patients.
    """

    grid: str = "phantom"
    out: str = "runs/ablation"
    bootstrap: int = 2000

    def __post_init__(self) -> None:
        _require(self, "at least 1", "bootstrap")


@dataclass(frozen=True)
class SelectConfig(AblateConfig):
    """``ercn select``: the best row of a grid, chosen on the validation split over at least 5 seeds.

    grid: a YAML file whose ``choose`` says by what, or "select", the packaged one that chose the defaults.
    out: folder of cells and choice; ``ercn ablate`` may share it. Started again, the command goes on; started several
        times at once on one folder, the processes share the cells.
    bootstrap: draws over patients.
    """

    grid: str = "select"
    out: str = "runs/selection"


@dataclass(frozen=True)
class PredictConfig:
    """``ercn predict``: grades and heat maps of any pictures.

    run: folder of ``ercn train``. input: a picture or a folder of pictures.
    out: folder for ``predictions.csv`` and overlays.
    overlays: which maps to draw at the original picture's full resolution.
    batch_size: pictures per forward pass. workers: loader processes.
    scales: sizes, relative to the training's, at which the maps are computed and averaged (SEAM: 0.5, 1, 1.5, 2);
        1 must be one of them, from which alone the grades are. flip: the maps' average has mirrored pictures too.
    max_unreadable: unreadable pictures that are skipped, by name, before it stops.
    max_pixels: pictures whose longer side squared is larger count as unreadable.
    accelerator: "cpu", "gpu" or "cuda"; "auto" is CUDA where there is one, else the CPU.
    progress: a progress bar where the output is a terminal.
    """

    run: str = "runs/ercn"
    input: str = ""
    out: str = "runs/predictions"
    overlays: tuple[str, ...] = ("cam", "refined_cam", "attention")
    batch_size: int = 8
    workers: int = 2
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    max_unreadable: int = 10
    max_pixels: int = 200_000_000
    accelerator: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        _require(self, "at least 1", "batch_size", "max_pixels")
        _require(self, "at least 0", "workers", "max_unreadable")
        _require_scales(self)


@dataclass(frozen=True)
class ExportConfig:
    """``ercn export``: the network for programs without ``ercn``, with a script that predicts.

    run: folder of ``ercn train``. out: a new or empty folder.
    format: "onnx" for ONNX Runtime; "pt2" for ``torch.export.load``; "aoti", compiled by AOTInductor for the processor
        of this machine, for C++ without Python.
    """

    run: str = "runs/ercn"
    format: Literal["onnx", "pt2", "aoti"] = "onnx"
    out: str = "runs/exported"


@dataclass(frozen=True)
class ReportConfig:
    """``ercn report RUN …``: one page that compares runs.

    runs: folders of ``ercn train``. out: the HTML file to write.
    """

    runs: tuple[str, ...] = ()
    out: str = "report.html"


@dataclass(frozen=True)
class PrepareConfig:
    """``ercn prepare``: find the fundus disc, crop, resize and cache a data set, and save its splits.

    dataset: "phantom", or the published data set. root: the published layout's folder (csv: the file; not for the
        phantom). out: the cache.
    label: which label column, where the data set has several; empty for the first. "one_figure" or "concatenated"
        (davis), "dr" or "dme" (messidor2, idrid), "ours" or "kaggle" (rldr), the column's name (csv, first "label").
    size: side of the cached pictures.
    normalize: "none" keeps the pictures; "graham" subtracts the local mean color (Graham 2015), "local" that of a wider
        neighbourhood, from the cached ones (``ercn.data.normalization``).
    fractions: train, val, test by patient; a split that the publishers made is kept.
    exclude: a prepared folder of pictures from the same source, whose patients are not taken.
    patients: phantom only, how many. difficulty: phantom only; the harder, the fainter the lesions, the more there is
        that looks like them, and the worse the camera.
    max_unreadable: unreadable or missing pictures that are skipped, by name, before it stops.
    max_pixels: pictures whose longer side squared is larger count as unreadable.
    seed: of splits and phantom. workers: processes that read pictures.
    progress: a progress bar where the output is a terminal.
    """

    dataset: Dataset = "phantom"
    root: str = ""
    out: str = "runs/data"
    size: int = 513
    label: str = ""
    normalize: Literal["none", "graham", "local"] = "none"
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    exclude: str = ""
    patients: int = 200
    difficulty: Literal["easy", "standard", "hard"] = "standard"
    seed: int = 0
    workers: int = 2
    max_unreadable: int = 10
    max_pixels: int = 200_000_000
    progress: bool = True

    def __post_init__(self) -> None:
        _require(self, "at least 32", "size")
        _require(self, "at least 1", "max_pixels")
        _require(self, "at least 0", "fractions", "patients", "seed", "workers", "max_unreadable")


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
    if origin is UnionType:  # X | None, bool | str
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
