"""Layers around the ops of ``ercn.ops``: each holds the parameters of one op call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ercn.elements import resize
from ercn.ops import affinity_propagate, attention_scores, gated_attention_pool, pixel_adaptive_refinement
from ercn.ops.refinement import check_settings


class PixelCorrelation(nn.Module):
    """SEAM's pixel correlation module: refine a CAM by the affinity of learned pixel embeddings.

        f = E · [image ; relu(P_1 features_1) ; relu(P_2 features_2) ; …],   out = ``affinity_propagate(cam, f)``

    Feature maps and image are first resized to the grid of the CAM (bilinear), then projected; all products are 1×1
    convolutions without bias. Memory is O(N·(C + D)) in the N = h·w elements of the CAM.

    Args:
        in_channels: channels of each feature map.
        embed_dim: D, channels of the embedding (SEAM: 192).
        proj_channels: channels of each projection P_i (SEAM: 64 and 128).
        image_channels: channels of the picture, 3; 0 leaves the picture out.
        steps: how often the normalised affinity is applied.
        center: subtract from f its mean over the picture, so that elements are similar if they differ from the mean in
            the same direction. SEAM does not; f of features after a ReLU then has nearly one direction, all affinities
            are near 1, and the result is near the mean of the map.
        align_corners: of the resizing (``ercn.elements`` says where elements lie); True as in SEAM.

    Parameters, in this order in the state dict:
        projections.{i}.weight: P_i, [proj_channels[i], in_channels[i], 1, 1]; Kaiming-normal.
        embed.weight: E, [embed_dim, image_channels + Σ proj_channels, 1, 1]; Xavier-uniform, gain 4. The input's
            channels are the picture's, then those of the projections in their order (SEAM's order).

    Deterministic in the forward pass; on CUDA the backward of the resize is not bit-reproducible (it is not run when
    picture and features need no gradient). Source: Wang et al., CVPR 2020, and its published code.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        embed_dim: int = 192,
        *,
        proj_channels: Sequence[int] = (64, 128),
        image_channels: int = 3,
        steps: int = 1,
        center: bool = False,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        if len(in_channels) != len(proj_channels):
            raise ValueError(
                f"proj_channels needs one entry for each of the {len(in_channels)} feature maps; "
                f"got {list(proj_channels)} for in_channels {list(in_channels)}"
            )
        self.image_channels, self.steps, self.center = image_channels, steps, center
        self.align_corners = align_corners
        projections = [nn.Conv2d(channels, width, 1, bias=False) for channels, width in zip(in_channels, proj_channels)]
        self.projections = nn.ModuleList(projections)
        self.embed = nn.Conv2d(image_channels + sum(proj_channels), embed_dim, 1, bias=False)
        for projection in projections:
            nn.init.kaiming_normal_(projection.weight)
        nn.init.xavier_uniform_(self.embed.weight, gain=4)

    @classmethod
    def from_seam(cls, state_dict: Mapping[str, Tensor], *, steps: int = 1) -> PixelCorrelation:
        """Build the layer from SEAM's weights: f8_3 and f8_4 become projections.0 and .1, f9 becomes embed.

        ``state_dict`` may hold the whole SEAM network, with a prefix such as ``module.``; other keys are ignored.
        """
        prefix, weights = _find(state_dict, {"SEAM": ("f8_3.weight", "f8_4.weight", "f9.weight")})[1:]
        low, mid, embed = weights
        image_channels = embed.shape[1] - low.shape[0] - mid.shape[0]
        if image_channels < 0:
            raise ValueError(
                f"'{prefix}f9.weight' reads {embed.shape[1]} channels, fewer than the "
                f"{low.shape[0]} + {mid.shape[0]} that f8_3 and f8_4 write"
            )
        layer = cls(
            (low.shape[1], mid.shape[1]),
            embed.shape[0],
            proj_channels=(low.shape[0], mid.shape[0]),
            image_channels=image_channels,
            steps=steps,
        ).to(embed)
        layer.load_state_dict({"projections.0.weight": low, "projections.1.weight": mid, "embed.weight": embed})
        return layer

    def forward(self, cam: Tensor, features: Sequence[Tensor], image: Tensor | None = None) -> Tensor:
        """Refine ``cam``.

        Args:
            cam: [B, C, h, w].
            features: one map [B, in_channels[i], h_i, w_i] for each projection, any resolution of the same picture.
            image: [B, image_channels, H, W]; None only where ``image_channels`` is 0.

        Returns:
            Like ``cam``.

        Raises:
            ValueError: not the layer's number of feature maps or of picture channels.
        """
        if len(features) != len(self.projections):
            raise ValueError(f"expected {len(self.projections)} feature maps; got {len(features)}")
        if (0 if image is None else image.shape[1]) != self.image_channels:
            got = "none" if image is None else list(image.shape)
            raise ValueError(f"image must be [B, {self.image_channels}, H, W] (image_channels); got {got}")
        size, corners = cam.shape[-2:], self.align_corners
        parts = [] if image is None else [resize(image, size, corners)]
        parts += [proj(resize(x, size, corners)).relu() for proj, x in zip(self.projections, features)]
        embedding = self.embed(torch.cat(parts, 1))
        if self.center:
            embedding = embedding - embedding.mean((2, 3), keepdim=True)
        return affinity_propagate(cam, embedding, steps=self.steps)


class PixelAdaptiveRefinement(nn.Module):
    """PAMR, pixel-adaptive mask refinement: align maps with the edges of the picture, without parameters.

    ``ercn.ops.pixel_adaptive_refinement(cam, image)``, which has the formula.

    Args:
        dilations: distances of the neighbours in pixels, each at least 1.
        steps: how often the weights are applied; 0 returns the map.
        form: "pamr", or "par" for the weights of PAR.

    It is one operator in compiled and exported networks. The map has a gradient; the picture is detached. Flips and
    quarter turns of picture and map do the same to the result, up to rounding. Deterministic. Source: Araslanov and
    Roth, CVPR 2020 (arXiv 2005.08104), and its published code, which also resizes the map to the picture.

    >>> import torch
    >>> from ercn.nn import PixelAdaptiveRefinement
    >>> image = torch.tensor([0.0, 0, 0, 1, 1, 1]).expand(1, 3, 6, 6)           # an edge in the middle
    >>> cam = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1]).expand(1, 1, 6, 6)     # and a map without one
    >>> PixelAdaptiveRefinement(dilations=(1, 2), steps=10)(cam, image)[0, 0, 0].round(decimals=2)
    tensor([0.1500, 0.1500, 0.1500, 0.8500, 0.8500, 0.8500])
    """

    def __init__(
        self, dilations: Sequence[int] = (1, 2, 4, 8, 12, 24), steps: int = 10, *, form: str = "pamr"
    ) -> None:
        super().__init__()
        check_settings(dilations, steps, form)
        self.dilations, self.steps, self.form = tuple(dilations), steps, form

    def forward(self, cam: Tensor, image: Tensor) -> Tensor:
        """Refine ``cam``.

        Args:
            cam: [B, C, H, W], floating point, of any range.
            image: [B, K, H, W], of any dtype: the picture at the size of the map.

        Returns:
            Like ``cam``.

        Raises:
            ValueError: shapes that do not fit, or a map that is not floating point.
        """
        return pixel_adaptive_refinement(
            cam, image.detach(), dilations=self.dilations, steps=self.steps, form=self.form
        )

    def extra_repr(self) -> str:
        return f"dilations={self.dilations}, steps={self.steps}, form={self.form!r}"


# The Linear layers V, [U,] w of published attention layers; {} is the index of a head.
_ATTENTION_LAYOUTS = {
    "AMLab gated": ("attention_V.0", "attention_U.0", "attention_w"),
    "AMLab plain": ("attention.0", "attention.2"),
    "AMLab 2020 gated": ("attention_V.0", "attention_U.0", "attention_weights"),
    "CLAM gated": ("attention_a.0", "attention_b.0", "attention_c"),
    "CLAM plain": ("module.0", "module.2"),
    "CLAM plain with dropout": ("module.0", "module.3"),
    "torchmil gated": ("fc1.module", "fc_gated.module", "fc2"),
    "torchmil plain": ("fc1.module", "fc2"),
    "torchmil CAMIL gated": ("fc1", "fc_gated", "fc2"),
    "torchmil CAMIL plain": ("fc1", "fc2"),
    "TRIDENT gated": ("attention_heads.{}.0", "gating_layers.{}.0", "branching_layers.{}"),
    "TRIDENT plain": ("attention_heads.{}.0", "branching_layers.{}"),
}
_SAME_LAYOUT = {
    "AMLab 2020 plain": "AMLab plain",
    "MIL-Lab gated": "CLAM gated",
    "MIL-Lab plain": "CLAM plain with dropout",
}


class GatedAttentionPool(nn.Module):
    """Attention pooling of a bag of instances, with K heads.

        s_k = w · (act(V h_k + b_V) ⊙ σ(U h_k + b_U)) + b_w,   a = softmax_k(s),   z = Σ_k a_k h_k

    Args:
        dim: D, channels of an instance.
        hidden: L, width of the attention.
        heads: K.
        gated: False leaves out the gate σ(U h + b_U).
        bias: whether there are b_V, b_U and b_w: one bool for all, or three. The published code has them, the formula
            of the paper does not, and torchmil has no b_w.
        activation: act, "tanh", "relu" or "gelu".
        dropout: probability with which each unit of act(·) and, independently, of σ(·) is dropped in training mode.
        groups: G. Heads and hidden units form G groups in their order; a head reads the units of its group only, as
            TRIDENT's heads do.
        device, dtype: of the parameters.

    Parameters: v_weight, u_weight [L, D]; v_bias, u_bias [L]; w_weight [K, L / G]; w_bias [K]; an absent one is None.
    All are initialised as ``torch.nn.Linear`` does. Sources: Ilse, Tomczak, Welling, ICML 2018; for the dropout CLAM
    (Lu et al., Nature Biomedical Engineering 2021) and its published code.

    >>> import torch
    >>> from ercn.nn import GatedAttentionPool
    >>> pool = GatedAttentionPool(16, hidden=8, heads=2, dropout=0.25).eval()
    >>> pooled, scores = pool(torch.randn(3, 100, 16))
    >>> pooled.shape, scores.shape
    (torch.Size([3, 2, 16]), torch.Size([3, 2, 100]))
    >>> list(pool.to_state_dict("CLAM", prefix="attention_net.3."))[:2]
    ['attention_net.3.attention_a.0.weight', 'attention_net.3.attention_a.0.bias']
    """

    v_weight: nn.Parameter
    v_bias: nn.Parameter | None
    u_weight: nn.Parameter | None
    u_bias: nn.Parameter | None
    w_weight: nn.Parameter
    w_bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        hidden: int = 128,
        heads: int = 1,
        *,
        gated: bool = True,
        bias: bool | tuple[bool, bool, bool] = True,
        activation: str = "tanh",
        dropout: float = 0.0,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        biases = (bias,) * 3 if isinstance(bias, bool) else tuple(bias)
        if len(biases) != 3:
            raise ValueError(f"bias must be one bool, or three for b_V, b_U and b_w; got {bias}")
        if activation not in ("tanh", "relu", "gelu"):
            raise ValueError(f"activation must be 'tanh', 'relu' or 'gelu'; got {activation!r}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability, 0 to 1; got {dropout}")
        if groups < 1 or heads % groups or hidden % groups:
            raise ValueError(f"groups must divide heads {heads} and hidden {hidden}; got {groups}")
        self.activation, self.dropout, self.groups = activation, dropout, groups
        shapes = {"v": (hidden, dim), "u": (hidden, dim) if gated else None, "w": (heads, hidden // groups)}
        for (name, shape), with_bias in zip(shapes.items(), biases):
            for kind, size in (("weight", shape), ("bias", shape[:1] if shape and with_bias else None)):
                made = None if size is None else nn.Parameter(torch.empty(size, device=device, dtype=dtype))
                self.register_parameter(f"{name}_{kind}", made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters as ``torch.nn.Linear`` does, uniform in ±1/√(inputs of the layer)."""
        for name, parameter in self.named_parameters():
            bound = (self.w_weight if name.startswith("w_") else self.v_weight).shape[1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], *, activation: str = "tanh", dropout: float | None = None
    ) -> GatedAttentionPool:
        """Build the layer from the weights of a published attention layer.

        The layouts, with the names of V, U and w (without a gate, of V and w):

        - AMLab: ``attention_V.0``, ``attention_U.0``, ``attention_w``, or ``attention.0``, ``attention.2``.
          AMLab-Amsterdam/AttentionDeepMIL, ``model.py``.
        - AMLab 2020: ``attention_weights`` instead of ``attention_w``. The same code from March 2020 to June 2023, and
          ACMIL and IBMIL, which follow it.
        - CLAM: ``attention_a.0``, ``attention_b.0``, ``attention_c``, or ``module.0``, ``module.2``, with dropout
          ``module.0``, ``module.3``. mahmoodlab/CLAM, ``models/model_clam.py``.
        - MIL-Lab: CLAM's names; not gated always ``module.3``. mahmoodlab/MIL-Lab, ``src/models/layers.py``.
        - torchmil: ``fc1.module``, ``fc_gated.module``, ``fc2``; one head, no b_w. Franblueee/torchmil,
          ``torchmil/nn/attention/attention_pool.py``.
        - torchmil CAMIL: ``fc1``, ``fc_gated``, ``fc2``; one head, no b_w. ``torchmil/models/camil.py``, which pools
          other features than it scores.
        - TRIDENT: H heads with R branches each, ``attention_heads.{i}.0``, ``gating_layers.{i}.0``,
          ``branching_layers.{i}``. They become ``groups=H`` and H·R heads, all branches of head 0 first; the condensing
          layer takes ``pooled.unflatten(1, (H, R)).transpose(1, 2).flatten(2)``. mahmoodlab/TRIDENT,
          ``trident/slide_encoder_models/model_zoo/reusable_blocks/ABMIL.py``.

        Each has ``.weight`` and possibly ``.bias``. ``state_dict`` may hold a whole network: a prefix is detected,
        other keys are ignored. The parameters are copies, on the device and in the dtype of the weights, neither
        transposed nor reordered.

        Args:
            state_dict: the weights.
            activation: of the source, which the keys do not show: torchmil has all three, the others "tanh".
            dropout: of the layer. None is 0, with a warning if the keys show that the source had dropout: a gap before
                ``module.3``, or CLAM's network with its gated attention at ``attention_net.3`` (until April 2024 at
                ``attention_net.2`` without dropout). A gated layer without its network does not show it, because the
                dropout comes last and has no weights: 0.25 by default in CLAM's training and in MIL-Lab, 0 in TRIDENT.

        Raises:
            ValueError: not exactly one such layer (the message lists the keys found and those accepted), or weights
                that do not fit each other.
        """

        def is_one(name: str, prefix: str) -> bool:
            if name.endswith("plain") and name.startswith(("torchmil", "TRIDENT")):  # a gated one has these keys too
                gates = (f"{prefix}fc_gated.", f"{prefix}gating_layers.")
                if any(key.startswith(gates) for key in state_dict):
                    return False
            if not name.startswith("torchmil"):
                return True
            one_head = state_dict[f"{prefix}fc2.weight"].shape[:1] == (1,)
            return one_head and f"{prefix}fc2.bias" not in state_dict  # otherwise it is an MLP

        first = {
            name: tuple(f"{layer.format(0)}.weight" for layer in layers) for name, layers in _ATTENTION_LAYOUTS.items()
        }
        name, prefix, weights = _find(state_dict, first, is_one)
        layers = _ATTENTION_LAYOUTS[name]
        groups = 1
        while "{}" in layers[0] and f"{prefix}{layers[0].format(groups)}.weight" in state_dict:
            groups += 1
        letters = "vuw" if len(layers) == 3 else "vw"
        if any(weight.dim() != 2 for weight in weights):
            raise ValueError(f"{name} at '{prefix}' needs matrices; got {[list(weight.shape) for weight in weights]}")
        (hidden, dim), (heads, _) = weights[0].shape, weights[-1].shape
        own = {}
        for letter, layer in zip(letters, layers):
            rows = heads if letter == "w" else hidden
            for kind, shape in (("weight", (rows, hidden if letter == "w" else dim)), ("bias", (rows,))):
                keys = [f"{prefix}{layer.format(i)}.{kind}" for i in range(groups)]
                if kind == "weight" or any(key in state_dict for key in keys):
                    own[f"{letter}_{kind}"] = torch.cat([_fitting(state_dict, key, shape, weights[0]) for key in keys])
        if dropout is None:
            _warn_of_dropout(layers, prefix)
        pool = cls(
            dim,
            groups * hidden,
            groups * heads,
            gated="u" in letters,
            bias=("v_bias" in own, "u_bias" in own, "w_bias" in own),
            activation=activation,
            dropout=dropout or 0.0,
            groups=groups,
            device="meta",
        )
        pool.load_state_dict(own, assign=True)
        return pool

    def to_state_dict(self, layout: str, prefix: str = "") -> dict[str, Tensor]:
        """Copies of the weights under the names of a published layer, the inverse of ``from_state_dict``.

        Args:
            layout: "AMLab", "AMLab 2020", "CLAM", "MIL-Lab", "torchmil", "torchmil CAMIL" or "TRIDENT". The last
                product of CLAM's layer without a gate is at ``module.3`` if this layer has dropout. The weights do not
                hold activation, dropout and TRIDENT's condensing layer: set them there to match.
            prefix: before each key, such as "attention_net.3.".

        Raises:
            ValueError: an unknown layout, or one that cannot hold this layer's heads, groups or b_w.
        """
        kind = "plain" if self.u_weight is None else "gated"
        names = {name: name for name in _ATTENTION_LAYOUTS} | _SAME_LAYOUT
        name = names.get(f"{layout} {kind}")
        if name is None:
            known = ", ".join(known.removesuffix(f" {kind}") for known in names if known.endswith(kind))
            raise ValueError(f"layout must be one of {known}; got {layout!r}")
        if self.dropout and f"{layout} {kind} with dropout" in names:
            name += " with dropout"
        if self.groups > 1 and layout != "TRIDENT":
            raise ValueError(f"layout {layout!r} has no groups, only TRIDENT has; this layer has {self.groups}")
        if layout.startswith("torchmil") and (len(self.w_weight) > 1 or self.w_bias is not None):
            has = f"heads = {len(self.w_weight)}, {'no' if self.w_bias is None else 'a'} b_w"
            raise ValueError(f"layout {layout!r} has one head and no b_w; this layer has {has}")
        state = {}
        for letter, layer in zip("vuw" if kind == "gated" else "vw", _ATTENTION_LAYOUTS[name]):
            for part in ("weight", "bias"):
                own = getattr(self, f"{letter}_{part}")
                for i, rows in enumerate(() if own is None else own.detach().chunk(self.groups)):
                    state[f"{prefix}{layer.format(i)}.{part}"] = rows.clone()
        return state

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        masked_score: float = -torch.inf,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pool bags.

        Args:
            x: bags [B, N, D]; one bag [N, D]; feature maps [B, D, H, W], whose N = H·W elements are the instances (not
                copied); or ragged bags [T, D] with ``cu_seqlens``.
            mask: bool or 0/1 of any dtype, True = real instance: [B, N], [N] or, for feature maps, [B, H, W].
            cu_seqlens: [B + 1] int32 or int64, the bounds of the ragged bags.
            key_padding_mask: the inverse of ``mask``, as in ``torch.nn.MultiheadAttention``: True = padding. Give one
                of the two.
            masked_score: the score of masked instances.
            generator: of the dropout, on x's device; None is torch's own.

        Returns:
            pooled [B, K, D], and the scores before the softmax: [B, K, N], [B, K, H, W] or [K, T]; without B for one
            bag.

        ``ercn.ops.gated_attention_pool`` has the errors, masked and empty bags, dtypes, dropout and determinism.
        """
        given = (mask, cu_seqlens, key_padding_mask, masked_score, generator)
        pooled, scores = self._run(gated_attention_pool, x, *given)
        return pooled, scores.unflatten(2, x.shape[2:]) if x.dim() == 4 else scores

    def scores(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        masked_score: float = -torch.inf,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Only the scores of ``forward``, for the same arguments, without pooling: ``ercn.ops.attention_scores``."""
        given = (mask, cu_seqlens, key_padding_mask, masked_score, generator)
        scores: Tensor = self._run(attention_scores, x, *given)
        return scores.unflatten(2, x.shape[2:]) if x.dim() == 4 else scores

    def _run(
        self,
        op: Callable[..., Any],
        x: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        key_padding_mask: Tensor | None,
        masked_score: float,
        generator: torch.Generator | None,
    ) -> Any:
        weight = self.w_weight if self.groups == 1 else torch.block_diag(*self.w_weight.chunk(self.groups))
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
            mask, key_padding_mask = (m if m is None else m.flatten(1) for m in (mask, key_padding_mask))
        drops = self.training and self.dropout > 0
        return op(
            x,
            self.v_weight,
            self.v_bias,
            self.u_weight,
            self.u_bias,
            weight,
            self.w_bias,
            mask=mask,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            activation=self.activation,
            dropout_p=self.dropout if drops else 0.0,
            generator=generator if drops else None,
            masked_score=masked_score,
        )

    def extra_repr(self) -> str:
        (hidden, dim), heads = self.v_weight.shape, self.w_weight.shape[0]
        gated = self.u_weight is not None
        biases = (self.v_bias is not None, self.u_bias is not None, self.w_bias is not None)
        same = biases[0] == biases[2] == (biases[1] or not gated and biases[0])
        text = f"{dim}, hidden={hidden}, heads={heads}, gated={gated}, bias={biases[0] if same else biases}"
        others = {"activation": ("tanh", self.activation), "dropout": (0, self.dropout), "groups": (1, self.groups)}
        return text + "".join(f", {name}={value!r}" for name, (usual, value) in others.items() if value != usual)


def _fitting(state_dict: Mapping[str, Tensor], key: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """``state_dict[key]``, checked for this shape and the dtype and device of ``like``."""
    if key not in state_dict:
        raise ValueError(f"'{key}' is missing, its layer's others are there. Keys found: {', '.join(state_dict)}")
    tensor = state_dict[key].detach()
    if tuple(tensor.shape) != shape or tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"'{key}' must be {like.dtype} {list(shape)} on {like.device} to fit the layer's first weight "
            f"{list(like.shape)}; got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    return tensor


def _warn_of_dropout(layers: tuple[str, ...], prefix: str) -> None:
    if layers[-1] == "module.3":
        seen = f"there is a module without weights before '{prefix}module.3'"
    elif layers[-1] == "attention_c" and prefix.endswith("attention_net.3."):
        seen = f"CLAM's network has its attention at '{prefix[:-1]}' when it has dropout, and since April 2024 always"
    else:
        return
    warnings.warn(
        f"the weights may come from a layer with dropout: {seen}. This layer has none; dropout=0.25, or what the "
        "source had, trains as the source did, and dropout=0.0 keeps it so",
        stacklevel=3,
    )


def _find(
    state_dict: Mapping[str, Tensor],
    layouts: Mapping[str, tuple[str, ...]],
    is_one: Callable[[str, str], bool] = lambda name, prefix: True,
) -> tuple[str, str, list[Tensor]]:
    """The only layout and key prefix for which ``state_dict`` holds all weights of a layer, and these weights.

    ``is_one(layout, prefix)`` can reject a layout with all keys.
    """
    found = []
    for name, keys in layouts.items():
        for key in state_dict:
            prefix = key[: len(key) - len(keys[0])]
            complete = key == prefix + keys[0] and all(prefix + k in state_dict for k in keys)
            if complete and prefix[-1:] in ("", ".") and is_one(name, prefix):
                found.append((name, prefix, [state_dict[prefix + k] for k in keys]))
    if len(found) != 1:
        accepted = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in layouts.items())
        matches = "none" if not found else ", ".join(f"{name} at '{prefix}'" for name, prefix, _ in found)
        raise ValueError(
            f"expected the weights of exactly one layer, found {matches}. Accepted, with any prefix: {accepted}. "
            f"Keys found: {', '.join(state_dict) or 'none'}"
        )
    return found[0]
