"""Layers around the two ops of ``ercn.ops``, parameters and one op call each; and a refinement without parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ercn.elements import resize
from ercn.ops import affinity_propagate, gated_attention_pool


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
        center: subtract from f its mean over the picture, so that an element is like those which differ from the mean
            in the same way. SEAM does not; then f, of features behind a ReLU, points one way nearly everywhere, every
            affinity is near 1, and the result near the mean of the map.
        align_corners: of the resizing, where the elements of the maps lie (``ercn.elements``); SEAM's corners are.

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
        self.projections = nn.ModuleList(
            nn.Conv2d(channels, width, 1, bias=False) for channels, width in zip(in_channels, proj_channels)
        )
        self.embed = nn.Conv2d(image_channels + sum(proj_channels), embed_dim, 1, bias=False)
        for projection in self.projections:
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
            ValueError: another number of feature maps or picture channels than the layer was built for.
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
    """PAMR, pixel-adaptive mask refinement: draw maps to the edges of the picture, without parameters.

        k_ij = -mean_c |I_c(i) - I_c(j)| / (1e-8 + 0.1 σ_c(i)),   w_ij = softmax_j(k_ij),   m_i <- Σ_j w_ij m_j

    The neighbours j of pixel i are the 8 at each dilation d, (±d or 0, ±d or 0) away; i itself is none of them. σ_c(i)
    is the standard deviation (n - 1 in the denominator) of channel c over the 9 pixels of each dilation, in which i
    counts once for each. Beyond the border, picture and map repeat their edge. Rows of w sum to 1: constants stay, and
    no value leaves the range of the map. Scale and offset of the picture do not matter. Flips and quarter turns of
    picture and map turn the result, to rounding.

    Args:
        dilations: distances of the neighbours in pixels, each at least 1.
        steps: how often w is applied; 0 returns the map.

    The weights of one picture at a time take 8·len(dilations)·H·W values: with six dilations in float32 12.7 MB at
    257 × 257 and 806 MB at 2049 × 2049. Compiled and exported networks hold it as one operator.

    Inputs are detached: nothing here gives a gradient. Computed in float32, or in float64 where an input is.
    Deterministic. Source: Araslanov and Roth, CVPR 2020 (arXiv 2005.08104), and its published code, which also resizes
    the map to the picture.

    >>> import torch
    >>> from ercn.nn import PixelAdaptiveRefinement
    >>> image = torch.tensor([0.0, 0, 0, 1, 1, 1]).expand(1, 3, 6, 6)           # an edge in the middle
    >>> cam = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1]).expand(1, 1, 6, 6)     # and a map without one
    >>> PixelAdaptiveRefinement(dilations=(1, 2), steps=10)(cam, image)[0, 0, 0].round(decimals=2)
    tensor([0.1500, 0.1500, 0.1500, 0.8500, 0.8500, 0.8500])
    """

    def __init__(self, dilations: Sequence[int] = (1, 2, 4, 8, 12, 24), steps: int = 10) -> None:
        super().__init__()
        if not dilations or min(dilations) < 1:
            raise ValueError(f"dilations must be at least one distance of 1 or more pixels; got {list(dilations)}")
        if steps < 0:
            raise ValueError(f"steps must be at least 0; got {steps}")
        self.dilations, self.steps = tuple(dilations), steps

    def forward(self, cam: Tensor, image: Tensor) -> Tensor:
        """Refine ``cam``.

        Args:
            cam: [B, C, H, W], floating point, of any range.
            image: [B, 3, H, W], of any dtype: the picture at the size of the map.

        Returns:
            Like ``cam``, without gradient.

        Raises:
            ValueError: another shape.
            TypeError: a map that is not floating point.
        """
        if cam.dim() != 4 or image.shape != (cam.shape[0], 3, *cam.shape[2:]) or not cam.numel():
            raise ValueError(
                "cam must be [B, C, H, W], not empty, and image [B, 3, H, W] of the same B, H and W; "
                f"got {list(cam.shape)} and {list(image.shape)}"
            )
        if not cam.is_floating_point():
            raise TypeError(f"cam must be floating point; got {cam.dtype}")
        if not self.steps:
            return cam.detach()
        return _refined_to_edges(cam.detach(), image.detach(), self.dilations, self.steps)

    def extra_repr(self) -> str:
        return f"dilations={self.dilations}, steps={self.steps}"


@torch.library.custom_op("ercn::pixel_adaptive_refinement", mutates_args=())
def _refined_to_edges(cam: Tensor, image: Tensor, dilations: Sequence[int], steps: int) -> Tensor:
    """One node of a compiled or exported network, where its steps would be thousands. Picture by picture: the weights
    are the largest tensor of an evaluation.
    """
    dtype = torch.promote_types(torch.promote_types(cam.dtype, image.dtype), torch.float32)
    refined = torch.empty_like(cam, memory_format=torch.contiguous_format)
    for out, m, picture in zip(refined.split(1), cam.to(dtype).split(1), image.split(1)):
        weights = _adaptive_weights(picture.to(dtype), dilations)
        for _ in range(steps):
            neighbours = _neighbours(m, dilations)
            m = torch.zeros_like(m)
            for weight, neighbour in zip(weights.split(1, 1), neighbours):
                m.addcmul_(weight, neighbour)
        out.copy_(m)
    return refined


@_refined_to_edges.register_fake
def _(cam: Tensor, image: Tensor, dilations: Sequence[int], steps: int) -> Tensor:
    return torch.empty_like(cam, memory_format=torch.contiguous_format)


def _neighbours(x: Tensor, dilations: Sequence[int]) -> list[Tensor]:
    """Views of the padded ``x``, each [B, C, H, W]: at every pixel its neighbour in one direction and distance."""
    reach, (h, w) = max(dilations), x.shape[2:]
    padded = F.pad(x, [reach] * 4, mode="replicate")
    moves = [(d * dy, d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    return [padded[:, :, reach + dy : reach + dy + h, reach + dx : reach + dx + w] for dy, dx in moves]


def _adaptive_weights(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """w of ``PixelAdaptiveRefinement`` as [B, 8·len(dilations), H, W]."""
    neighbours = _neighbours(image, dilations)
    first, second = torch.zeros_like(image), torch.zeros_like(image)
    for neighbour in neighbours:  # moments about pixel i, which is 1 of 9: the difference keeps 1/9 of ``second``
        difference = neighbour - image
        first += difference
        second.addcmul_(difference, difference)
    count = 9 * len(dilations)
    deviation = ((second - first.square() / count).clamp(min=0) / (count - 1)).sqrt()
    scale = -1 / (image.shape[1] * (1e-8 + 0.1 * deviation))
    weights = image.new_empty(len(image), len(neighbours), *image.shape[2:])
    for j, neighbour in enumerate(neighbours):
        weights[:, j] = ((neighbour - image).abs_() * scale).sum(1)
    weights -= weights.amax(1, keepdim=True)
    weights.exp_()
    return weights.div_(weights.sum(1, keepdim=True))


# Published attention layers whose weights ``GatedAttentionPool.from_state_dict`` takes; each entry is V, [U,] w.
# CLAM's plain layer has its last product at index 3 when it was built with dropout.
_ATTENTION_LAYOUTS = {
    "AMLab gated": ("attention_V.0", "attention_U.0", "attention_w"),
    "AMLab plain": ("attention.0", "attention.2"),
    "CLAM gated": ("attention_a.0", "attention_b.0", "attention_c"),
    "CLAM plain": ("module.0", "module.2"),
    "CLAM plain with dropout": ("module.0", "module.3"),
}


class GatedAttentionPool(nn.Module):
    """Attention pooling of a bag of instances, with K heads.

        s_k = w · (tanh(V h_k + b_V) ⊙ σ(U h_k + b_U)) + b_w,   a = softmax_k(s),   z = Σ_k a_k h_k

    Args:
        dim: D, channels of an instance.
        hidden: L, width of the attention.
        heads: K.
        gated: False leaves out the gate σ(U h + b_U).
        bias: b_V, b_U and b_w; the published code has them, the paper's formula does not.

    Parameters: v_weight, u_weight [L, D]; v_bias, u_bias [L]; w_weight [K, L]; w_bias [K]; those left out are None. All
    are initialised as ``torch.nn.Linear`` does. Source: Ilse, Tomczak, Welling, ICML 2018.
    """

    def __init__(self, dim: int, hidden: int = 128, heads: int = 1, *, gated: bool = True, bias: bool = True) -> None:
        super().__init__()
        shapes = {"v": (hidden, dim), "u": (hidden, dim) if gated else None, "w": (heads, hidden)}
        for name, shape in shapes.items():
            self.register_parameter(f"{name}_weight", None if shape is None else nn.Parameter(torch.empty(shape)))
            with_bias = bias and shape is not None
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(shape[0])) if with_bias else None)
        for name, parameter in self.named_parameters():
            fan_in = hidden if name.startswith("w_") else dim
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> GatedAttentionPool:
        """Build the layer from the weights of a published attention layer.

        AMLab-Amsterdam/AttentionDeepMIL: ``attention_V.0``, ``attention_U.0``, ``attention_w`` (GatedAttention) or
        ``attention.0``, ``attention.2`` (Attention). mahmoodlab/CLAM: ``attention_a.0``, ``attention_b.0``,
        ``attention_c`` (Attn_Net_Gated) or ``module.0``, ``module.2`` or ``module.3`` (Attn_Net). Each has ``.weight``
        and, where the layer has biases, ``.bias``. A whole network's state dict is fine: a prefix is found, other keys
        are ignored. No weight is transposed or reordered.

        Raises:
            ValueError: no such layer, or more than one; the message lists the keys found and those accepted.
        """
        layouts = {name: tuple(f"{layer}.weight" for layer in layers) for name, layers in _ATTENTION_LAYOUTS.items()}
        name, prefix, weights = _find(state_dict, layouts)
        biases = [state_dict.get(f"{prefix}{layer}.bias") for layer in _ATTENTION_LAYOUTS[name]]
        letters = "vuw" if len(weights) == 3 else "vw"
        hidden, dim = weights[0].shape
        pool = cls(dim, hidden, weights[-1].shape[0], gated="u" in letters, bias=biases[0] is not None)
        own = {f"{letter}_weight": weight for letter, weight in zip(letters, weights)}
        own |= {f"{letter}_bias": bias for letter, bias in zip(letters, biases) if bias is not None}
        pool.to(weights[0]).load_state_dict(own)
        return pool

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pool bags.

        Args:
            x: bags [B, N, D]; feature maps [B, D, H, W], whose N = H·W elements are the instances (read in place, not
                copied); or ragged bags [T, D] with ``cu_seqlens``.
            mask: bool, True = real instance, [B, N] or, for feature maps, [B, H, W].
            cu_seqlens: [B + 1] int32 or int64, where each ragged bag begins and ends.

        Returns:
            pooled [B, K, D], and the scores before the softmax: [B, K, N], [B, K, H, W] or [K, T].
        """
        h = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        mask = mask if mask is None else mask.flatten(1)
        weights = (self.v_weight, self.v_bias, self.u_weight, self.u_bias, self.w_weight, self.w_bias)
        pooled, scores = gated_attention_pool(h, *weights, mask=mask, cu_seqlens=cu_seqlens)
        return pooled, scores.unflatten(2, x.shape[2:]) if x.dim() == 4 else scores

    def extra_repr(self) -> str:
        (hidden, dim), heads = self.v_weight.shape, self.w_weight.shape[0]
        bias = self.v_bias is not None
        return f"{dim}, hidden={hidden}, heads={heads}, gated={self.u_weight is not None}, bias={bias}"


def _find(
    state_dict: Mapping[str, Tensor], layouts: Mapping[str, tuple[str, ...]]
) -> tuple[str, str, list[Tensor]]:
    """The one layout and key prefix under which ``state_dict`` holds all of a layer's weights, and these weights."""
    found = []
    for name, keys in layouts.items():
        for key in state_dict:
            prefix = key[: len(key) - len(keys[0])]
            if key == prefix + keys[0] and prefix[-1:] in ("", ".") and all(prefix + k in state_dict for k in keys):
                found.append((name, prefix, [state_dict[prefix + k] for k in keys]))
    if len(found) != 1:
        accepted = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in layouts.items())
        matches = "none" if not found else ", ".join(f"{name} at '{prefix}'" for name, prefix, _ in found)
        raise ValueError(
            f"expected the weights of exactly one layer, found {matches}. Accepted, with any prefix: {accepted}. "
            f"Keys found: {', '.join(state_dict) or 'none'}"
        )
    return found[0]
