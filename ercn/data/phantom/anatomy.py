"""The phantom's eye: optic disc, vessel trees, macula, pigment and choroid, with a CC0 photograph as texture.

Eye coordinates: those of a left eye, half the picture's width is 1, the fovea at the origin, the optic disc to the left
of it (nasal), y down. Both eyes of a patient share the plan; each has its own bends, twigs and view.

Source of the texture: `skimage/data/retina.jpg` (M. Häggström 2014, WikiJournal of Medicine 1(2), CC0).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import skimage
from PIL import Image
from scipy.interpolate import CubicSpline
from scipy.ndimage import binary_dilation, gaussian_filter, map_coordinates

from ercn.data.phantom.shapes import coverage, grid, smooth_noise

__all__ = ["Anatomy", "Eye"]

Eye = Literal["left", "right"]

APERTURE = 0.97  # radius of the camera's round field
_ARTERY, _VEIN = np.array([0.88, 0.50, 0.52]), np.array([0.80, 0.36, 0.43])


@dataclass(frozen=True)
class Pose:
    """Map from points q of an eye to the picture: M (zoom · Rot(angle) (q + Σ_k b_k sin(f_k · q + φ_k)) + shift).

    M mirrors x for a right eye.
    """

    mirror: float
    angle: float
    zoom: float
    shift: np.ndarray  # [2]
    bend: np.ndarray  # [K, 2]
    frequency: np.ndarray  # [K, 2]
    phase: np.ndarray  # [K]

    @classmethod
    def draw(cls, rng: np.random.Generator, side: Eye) -> Pose:
        return cls(
            mirror=1.0 if side == "left" else -1.0,
            angle=np.deg2rad(rng.uniform(-9, 9)),
            zoom=rng.uniform(0.88, 1.12),
            shift=np.array([rng.uniform(-0.06, 0.24), rng.uniform(-0.09, 0.09)]),
            bend=rng.uniform(-0.012, 0.012, (4, 2)),
            frequency=rng.uniform(-5, 5, (4, 2)),
            phase=rng.uniform(0, 2 * np.pi, 4),
        )

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Picture points of eye points [..., 2]."""
        bent = points + np.sin(points @ self.frequency.T + self.phase) @ self.bend
        c, s = self.zoom * np.cos(self.angle), self.zoom * np.sin(self.angle)
        x, y = bent[..., 0], bent[..., 1]
        return np.stack([self.mirror * (c * x - s * y + self.shift[0]), s * x + c * y + self.shift[1]], -1)


@dataclass(frozen=True)
class Vessels:
    """One generation of vessels of one kind.

    points: [V, P, 2], in coordinates of the eye or the picture. radius: [V, P]; a vessel ends where it is 0.
    """

    points: np.ndarray
    radius: np.ndarray


def _arcades(rng: np.random.Generator, disc: np.ndarray) -> np.ndarray:
    """Four arcades as waypoints [4, 5, 2]: upper and lower temporal, upper and lower nasal."""
    temporal = np.array([[0.0, 0.0], [0.10, 0.33], [0.42, 0.53], [0.95, 0.53], [1.75, 0.30]])
    nasal = np.array([[0.0, 0.0], [-0.06, 0.22], [-0.24, 0.46], [-0.50, 0.66], [-0.85, 0.85]])
    ways = np.stack([temporal, temporal, nasal, nasal])
    ways += rng.normal(scale=[[0.0], [0.03], [0.055], [0.08], [0.16]], size=ways.shape)
    ways[:2, 1:, 1] *= rng.uniform(0.82, 1.15, (2, 1))
    ways[[0, 2], :, 1] *= -1
    return disc + ways


def _along(ways: np.ndarray, count: int) -> np.ndarray:
    """Smooth curves [V, count, 2] through waypoints [V, W, 2]."""
    at = np.arange(ways.shape[1])
    return CubicSpline(at, ways, axis=1)(np.linspace(0, at[-1], count))


def _branch(rng, parent: Vessels, children: int, length, tortuosity: float, steps: int, shrink) -> Vessels:
    """Up to ``children`` branches of every vessel of ``parent``, at random places, to alternating sides.

    length: range of lengths. shrink: range of the radius, relative to the parent's at that place. steps: points of a
    branch.
    """
    vessels, count = parent.radius.shape
    alive = (parent.radius > 0).sum(1)
    place = (np.arange(children) + rng.random((vessels, children))) / children
    index = np.clip(((0.12 + 0.83 * place) * (alive[:, None] - 1)).astype(int), 1, count - 1)
    v = np.arange(vessels)[:, None]
    start, radius = parent.points[v, index], parent.radius[v, index]
    tangent = start - parent.points[v, index - 1]
    side = np.where((np.arange(children) + rng.integers(0, 2, (vessels, 1))) % 2, 1.0, -1.0)
    turn = rng.uniform(0.5, 1.15, side.shape)
    heading = np.arctan2(tangent[..., 1], tangent[..., 0]) + side * turn
    reach = rng.uniform(*length, side.shape)
    step = (reach / steps)[..., None]
    bend = -(side * turn * rng.uniform(-0.1, 0.9, side.shape))[..., None] * np.linspace(0, 1, steps)
    walk = np.cumsum(rng.normal(scale=tortuosity, size=(*side.shape, steps)) * np.sqrt(step), -1)
    angle = heading[..., None] + bend + walk
    points = np.stack([np.cos(angle), np.sin(angle)], -1) * step[..., None]
    points = start[:, :, None] + np.cumsum(points, 2)
    taper = np.linspace(1.0, 0.55, steps)
    radius = (radius * rng.uniform(*shrink, side.shape))[..., None] * taper
    radius *= (np.arange(children) < rng.integers(max(children - 2, 1), children + 1, (vessels, 1)))[..., None]
    return Vessels(points.reshape(-1, steps, 2), radius.reshape(-1, steps))


def _avoid(vessels: Vessels, center: np.ndarray, radius: float) -> Vessels:
    """Ends vessels where they enter the disc around ``center``."""
    near = ((vessels.points - center) ** 2).sum(-1) < radius**2
    return Vessels(vessels.points, vessels.radius * ~np.logical_or.accumulate(near, 1))


class Anatomy:
    """One eye of one patient, in picture coordinates.

    disc: the optic disc's ellipse [5], (x, y, radius along, radius across, angle). cup: its radius, relative to the
    disc's. fovea: [2]. arteries, veins: lists of ``Vessels``, a generation each, trunks first. zoom: the pose's.
    melanin, tessellation: darkness of the pigment and visible share of the choroid, 0 … 1.
    """

    def __init__(self, shared: np.random.Generator, own: np.random.Generator, side: Eye):
        """shared: stream of the patient, the same for both eyes. own: stream of the eye."""
        self._patient(shared)
        pose = Pose.draw(own, side)
        self.zoom = pose.zoom
        self.disc = np.array(
            [
                *pose(self._disc_center),
                *(pose.zoom * self._disc_radius * own.uniform(0.97, 1.03) * self._disc_shape),
                pose.mirror * (np.pi / 2 + pose.angle + self._disc_tilt),
            ]
        )
        self.fovea = pose(np.zeros(2))
        self.cup = np.clip(self._cup + own.normal(scale=0.03), 0.15, 0.75)
        self.arteries, self.veins = [], []
        for kind, trunks in ((self.arteries, self._arteries), (self.veins, self._veins)):
            generations = [trunks]
            twig = 0.9 * self._tortuosity
            generations.append(_branch(own, trunks, 7, (0.25, 0.75), twig, 24, (0.5, 0.75)))
            generations.append(_branch(own, generations[1], 3, (0.10, 0.35), 1.3 * twig, 12, (0.55, 0.8)))
            generations.append(_branch(own, generations[2], 2, (0.05, 0.18), 1.6 * twig, 8, (0.6, 0.85)))
            for one in generations:
                one = _avoid(one, np.zeros(2), self._avascular)
                kind.append(Vessels(pose(one.points), pose.zoom * one.radius))
        self._own = own

    def _patient(self, rng: np.random.Generator) -> None:
        """Draws what both eyes share."""
        self.melanin = rng.beta(1.4, 1.4)
        self.tessellation = rng.uniform(0, 1) ** 1.5
        self._hue = rng.normal(scale=[0.03, 0.04, 0.05])
        self._disc_center = np.array([-rng.uniform(0.55, 0.68), rng.uniform(-0.10, 0.03)])
        self._disc_radius = rng.uniform(0.115, 0.155)
        self._disc_shape = np.array([1.0, rng.uniform(0.85, 0.98)])
        self._disc_tilt = rng.normal(scale=0.15)
        self._cup = rng.uniform(0.2, 0.65)
        self._crescent = max(rng.uniform(-0.6, 1.0), 0.0)
        self._pallor = rng.uniform(0, 1)
        self._avascular = rng.uniform(0.06, 0.10)
        self._macula = rng.uniform(0.10, 0.32), rng.uniform(0.14, 0.26)
        self._tortuosity = rng.uniform(0.5, 1.5) * (1.8 if rng.random() < 0.15 else 1.0)
        self._caliber = rng.uniform(0.0125, 0.0165)
        self._contrast = rng.uniform(0.75, 1.1)
        ways = _arcades(rng, self._disc_center)
        trunks = []
        for width in (rng.uniform(0.62, 0.82), 1.0):
            points = _along(ways + rng.normal(scale=[[0.006], [0.02], [0.035], [0.05], [0.1]], size=ways.shape), 96)
            step = np.gradient(points, axis=1)
            normal = np.stack([-step[..., 1], step[..., 0]], -1) / np.hypot(step[..., 0], step[..., 1])[..., None]
            length = np.cumsum(np.hypot(step[..., 0], step[..., 1]), 1)
            wiggle = sum(
                rng.uniform(0, 0.011, (4, 1)) * np.sin(rng.uniform(8, 30, (4, 1)) * length + rng.uniform(0, 7, (4, 1)))
                for _ in range(2)
            )
            points = points + (self._tortuosity * np.minimum(length / 0.2, 1) * wiggle)[..., None] * normal
            radius = self._caliber * width * rng.uniform(0.85, 1.1, (4, 1)) * [[1], [1], [0.75], [0.75]]
            trunks.append(Vessels(points, radius * np.clip(1.0 - 0.42 * length, 0.3, 1)))
        self._arteries, self._veins = trunks

    def on_disc(self, size: int) -> np.ndarray:
        """The optic disc, bool [S, S]."""
        return self._disc_distance(size) <= 1

    def _disc_distance(self, size: int) -> np.ndarray:
        """0 in the middle of the optic disc, 1 on its outline."""
        x, y = grid(size)
        cx, cy, along, across, angle = self.disc
        c, s = np.cos(angle), np.sin(angle)
        u, v = ((x - cx) * c + (y - cy) * s) / along, ((y - cy) * c - (x - cx) * s) / across
        return np.sqrt(u * u + v * v)

    def vein_paths(self) -> list[np.ndarray]:
        """Centre lines [P, 2] of the veins and their larger branches, evenly spaced by 0.01."""
        paths = []
        for one in self.veins[:2]:
            for points, radius in zip(one.points, one.radius):
                points = points[: np.count_nonzero(radius)]
                if len(points) > 8:
                    length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
                    at = np.arange(0, length[-1], 0.01)
                    paths.append(np.stack([np.interp(at, length, points[:, i]) for i in (0, 1)], 1))
        return paths

    def vessel_cover(self, size: int, kinds: list[Vessels]) -> np.ndarray:
        """Share of each pixel that vessels cover, float64 [S, S]."""
        blobs = [_dense(one, 2 / size) for one in kinds]
        return coverage(size, np.concatenate(blobs), 0.004)

    def paint(self, size: int, vessels: float, texture: float) -> np.ndarray:
        """The healthy retina without distractors, float64 [S, S, 3] in 0 … 1.

        vessels, texture: factors on the opacity of vessels and on the strength of texture and choroid.
        """
        x, y = grid(size)
        own = deepcopy(self._own)  # each call draws the same
        light, dark = np.array([0.88, 0.50, 0.30]), np.array([0.52, 0.235, 0.125])
        base = (light * (1 - self.melanin) + dark * self.melanin) * (1 + self._hue)
        log = np.zeros((size, size))  # pigment and choroid: logarithm of the light that comes back
        log += 0.05 * smooth_noise(own, size, 3) + 0.035 * smooth_noise(own, size, 9)
        level = smooth_noise(own, size, own.uniform(9, 14)) + 0.35 * smooth_noise(own, size, 28)
        ridge = np.exp(-((level / 0.33) ** 2))
        patchy = 1 / (1 + np.exp(-1.5 * smooth_noise(own, size, 3)))
        fx, fy = x - self.fovea[0], y - self.fovea[1]
        depth, width = self._macula
        macula = np.exp(-(fx * fx + fy * fy) / (2 * (width * self.zoom) ** 2))
        choroid = texture * self.tessellation * (ridge - 0.35) * patchy * (1 - 0.8 * macula)
        grain = texture * _texture_at(own, size)
        picture = base * np.exp(
            log[..., None]
            + choroid[..., None] * [0.16, 0.24, 0.22]
            - depth * macula[..., None] * [0.8, 1.0, 1.1]
            + grain * own.uniform(0.6, 1.1)
        )
        rho = self._disc_distance(size)
        self._paint_disc(picture, rho, x, y)
        strength = vessels * self._contrast * np.clip(0.55 + 0.35 * rho, 0, 1)[..., None]
        for tint, kinds in ((_ARTERY, self.arteries), (_VEIN, self.veins)):
            picture *= 1 - self.vessel_cover(size, kinds)[..., None] * strength * (1 - tint)
        return picture

    def _paint_disc(self, picture: np.ndarray, rho: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        cx, cy, radius = self.disc[:3]
        glow = np.exp(-((np.maximum(rho - 1, 0) / 0.45) ** 2)) * (rho > 0.9)
        picture *= 1 + 0.10 * glow[..., None] * [0.6, 1.0, 1.0]
        side = np.sign(self.fovea[0] - cx)
        temporal = np.clip(side * (x - cx) / (np.hypot(x - cx, y - cy) + 1e-9), 0, 1)
        outer = np.clip((1.0 + 0.22 * self._crescent * temporal - rho) * radius / 0.02 + 0.5, 0, 1)
        crescent = outer * self._crescent
        picture += (np.array([0.82, 0.58, 0.36]) - picture) * 0.6 * crescent[..., None]
        a = 0.92 / (1 + np.exp((rho - 1) * radius / 0.008))
        rim = np.array([0.90, 0.60, 0.36]) * (1 - self._pallor) + np.array([0.96, 0.76, 0.54]) * self._pallor
        picture += (rim - picture) * a[..., None]
        cup = 0.75 / (1 + np.exp((rho - self.cup) * radius / 0.014))
        picture += (np.array([1.0, 0.90, 0.70]) - picture) * cup[..., None]


def _dense(vessels: Vessels, step: float) -> np.ndarray:
    """Circles [N, 5] along vessels, at most about ``step`` apart."""
    points, radius = vessels.points, vessels.radius
    length = np.hypot(*np.moveaxis(np.diff(points, axis=1), -1, 0))
    longest = np.quantile(length[radius[:, 1:] > 0], 0.95)
    between = max(int(np.ceil(longest / (0.9 * step))), 1)
    at = np.arange(between) / between
    alive = (radius[:, 1:] > 0)[..., None]
    px, py, r = (
        (a[:, :-1, None] * (1 - at) + a[:, 1:, None] * at)[np.broadcast_to(alive, (*length.shape, between))]
        for a in (points[..., 0], points[..., 1], radius)
    )
    return np.stack([px, py, r, r, 0 * r], 1)


@lru_cache(maxsize=1)
def _residual() -> Image.Image:
    """The photograph's fine texture without its vessels and optic disc, as 8-bit RGB: 128 + 400 · log-residual."""
    with Image.open(Path(skimage.__file__).parent / "data" / "retina.jpg") as picture:
        half = picture.convert("RGB").resize((705, 705), Image.Resampling.BOX)
    log = np.log(np.asarray(half, float) / 255 + 0.04)
    fine = log - gaussian_filter(log, (14, 14, 0))
    green = gaussian_filter(fine[..., 1], 2.0)
    x, y = grid(705)
    hole = binary_dilation(green < -0.05, iterations=3) | (green > 0.09)
    hole |= np.hypot(x + 0.70, y + 0.08) < 0.19
    hole |= np.hypot(x, y) > 0.93
    for shift in ((151, 47), (-97, 173), (211, -131), (-59, -223), (307, 19), (13, 289)):
        other, free = np.roll(fine, shift, (0, 1)), np.roll(~hole, shift, (0, 1))
        take = hole & free
        fine[take] = other[take]
        hole &= ~take
    fine[hole] = 0
    fine -= fine.mean((0, 1))
    return Image.fromarray(np.round(np.clip(128 + 400 * fine, 0, 255)).astype(np.uint8))


@lru_cache(maxsize=4)
def _texture(side: int) -> np.ndarray:
    """The texture at ``side`` pixels, float64 [3, side, side]."""
    small = _residual().resize((side, side), Image.Resampling.LANCZOS)
    return np.ascontiguousarray((np.asarray(small, float).transpose(2, 0, 1) - 128) / 400)


def _texture_at(rng: np.random.Generator, size: int) -> np.ndarray:
    """The texture at a random pose, mirrored beyond its borders, float64 [S, S, 3]."""
    angle, zoom, shift = 2 * np.pi * rng.random(), rng.uniform(0.8, 1.15), rng.uniform(-0.5, 0.5, 2)
    texture = _texture(min(705, size))
    x, y = grid(size)
    c, s = zoom * np.cos(angle), zoom * np.sin(angle)
    half = texture.shape[1] / 2
    where = ((s * x + c * y + shift[1] + 1) * half - 0.5, (c * x - s * y + shift[0] + 1) * half - 0.5)
    return np.stack([map_coordinates(one, where, order=1, mode="mirror") for one in texture], -1)
