"""Lesions of diabetic retinopathy as shapes: which ones a grade has (ICDR rules), and how they are painted.

Coordinates: the picture's half width is 1, x to the right, y down, origin in the centre, so a plan holds for any size.
Quadrants are those of the picture: 0 upper left, 1 upper right, 2 lower left, 3 lower right.

Source of the rules: Wilkinson et al. 2003, the International Clinical Diabetic Retinopathy (ICDR) severity scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# What a lesion does to the picture below it: "absorb" multiplies RGB by the tint, "cover" replaces RGB by it.
_LOOK = {
    "venous_beading": ("absorb", (0.74, 0.36, 0.54)),
    "irma": ("absorb", (0.72, 0.38, 0.50)),
    "microaneurysms": ("absorb", (0.66, 0.32, 0.44)),
    "hemorrhages": ("absorb", (0.58, 0.24, 0.34)),
    "soft_exudates": ("cover", (0.97, 0.84, 0.66)),
    "hard_exudates": ("cover", (1.00, 0.92, 0.50)),
    "neovascularization": ("absorb", (0.76, 0.36, 0.46)),
    "preretinal_hemorrhage": ("cover", (0.40, 0.06, 0.06)),
}
LESIONS = tuple(_LOOK)
FIELD = 0.90  # lesions lie within this radius; the aperture's is 0.97


@dataclass(frozen=True)
class Lesion:
    """One lesion: an ellipse, or a chain or cluster of them.

    kind: a name from ``LESIONS``. quadrant: 0 … 3, where its center lies.
    blobs: float64 [n, 5], rows (x, y, radius along, radius across, angle). wobble: float64 [k, 2], amplitude and phase
    of the outline's harmonics 2 … k+1. edge: width over which the opacity falls from 1 to 0 (at least one pixel is
    used).
    opacity: in (0, 1]. flat: the upper half is cut off, as where blood settles before the retina.
    """

    kind: str
    quadrant: int
    blobs: np.ndarray
    wobble: np.ndarray
    edge: float
    opacity: float
    flat: bool = False


def quadrant_of(x: float, y: float) -> int:
    return int(x >= 0) + 2 * int(y >= 0)


class _Planner:
    """Draws lesions at free places: inside the field, off the optic disc, apart from each other."""

    def __init__(self, rng: np.random.Generator, optic_disc: tuple[float, float, float], veins: list[np.ndarray]):
        self.rng = rng
        self.veins = veins
        self.taken = [optic_disc]
        self.lesions: list[Lesion] = []

    def place(self, radius: float, quadrant: int | None = None, gap: float = 0.03, field: float = FIELD):
        """A random center; its disc of ``radius`` keeps ``gap`` to all others, halved each time no place was found."""
        while True:
            for _ in range(100):
                r, a = (field - radius) * np.sqrt(self.rng.random()), 2 * np.pi * self.rng.random()
                x, y = r * np.cos(a), r * np.sin(a)
                if quadrant is not None:  # keep half a gap to the axes, so that a lesion lies in one quadrant
                    x = (abs(x) + radius) * (1 if quadrant % 2 else -1)
                    y = (abs(y) + radius) * (1 if quadrant >= 2 else -1)
                    if np.hypot(x, y) > field - radius:
                        continue
                if all(np.hypot(x - tx, y - ty) > radius + tr + gap for tx, ty, tr in self.taken):
                    self.taken.append((x, y, radius))
                    return x, y
            gap /= 2

    def add(self, kind, blobs, *, edge, opacity, wobble=0.0, flat=False):
        blobs = np.atleast_2d(np.asarray(blobs, float))
        amplitude = wobble * self.rng.normal(size=3) / np.arange(1, 4)
        shape = np.stack([amplitude, 2 * np.pi * self.rng.random(3)], 1) if wobble else np.zeros((0, 2))
        x, y = blobs[:, :2].mean(0)
        self.lesions.append(Lesion(kind, quadrant_of(x, y), blobs, shape, edge, opacity, flat))

    def microaneurysms(self, count):
        for _ in range(count):
            r = self.rng.uniform(0.014, 0.018)
            x, y = self.place(r)
            self.add("microaneurysms", (x, y, r, r, 0), edge=0.008, opacity=self.rng.uniform(0.8, 1.0))

    def hemorrhages(self, count, quadrant=None, largest=0.06):
        for _ in range(count):
            r = 0.020 * (largest / 0.020) ** (self.rng.random() ** 1.5)  # many dots, few blots
            x, y = self.place(r, quadrant, gap=0.008)
            flame = r > 0.028 and self.rng.random() < 0.4
            thin = self.rng.uniform(0.35, 0.5) if flame else self.rng.uniform(0.7, 1.0)
            blob = (x, y, r, thin * r, np.pi * self.rng.random())
            self.add("hemorrhages", blob, wobble=0.14, edge=0.012, opacity=self.rng.uniform(0.65, 1.0))

    def hard_exudates(self, clusters):
        for _ in range(clusters):
            spread = self.rng.uniform(0.05, 0.10)
            cx, cy = self.place(spread, field=0.75)
            ring = self.rng.random() < 0.4
            blobs = []
            for _ in range(self.rng.integers(6, 16)):
                a = 2 * np.pi * self.rng.random()
                d = spread * (self.rng.uniform(0.75, 0.95) if ring else 0.9 * np.sqrt(self.rng.random()))
                r = self.rng.uniform(0.010, 0.022)
                blobs.append(
                    (cx + d * np.cos(a), cy + d * np.sin(a), r, r * self.rng.uniform(0.6, 1), np.pi * self.rng.random())
                )
            self.add("hard_exudates", blobs, wobble=0.12, edge=0.008, opacity=self.rng.uniform(0.75, 0.95))

    def soft_exudates(self, count):
        for _ in range(count):
            r = self.rng.uniform(0.035, 0.06)
            x, y = self.place(1.3 * r, field=0.8)
            blob = (x, y, 1.2 * r, 0.8 * r, np.pi * self.rng.random())
            self.add("soft_exudates", blob, wobble=0.12, edge=0.9 * r, opacity=self.rng.uniform(0.6, 0.8))

    def vessel(self, x, y, heading, length, radius, tortuosity):
        """Blobs along a winding path that starts at (x, y) and thins out: rows as in ``Lesion.blobs``."""
        step = 0.8 * radius
        n = max(int(length / step), 2)
        turn = np.cumsum(self.rng.normal(scale=tortuosity, size=n) * np.sqrt(step))
        wave = 3.0 * tortuosity * step * np.cumsum(np.sin(np.arange(n) * step * 60 + 2 * np.pi * self.rng.random()))
        angle = heading + turn + wave
        px, py = x + step * np.cumsum(np.cos(angle)), y + step * np.cumsum(np.sin(angle))
        r = radius * np.linspace(1.0, 0.75, n)
        return np.stack([px, py, r, r, np.zeros(n)], 1)

    def irma(self, quadrant):
        """Winding, branching channels inside the retina, in one quadrant."""
        spread = 0.16
        x, y = self.place(spread, quadrant, gap=0.0)
        heading = 2 * np.pi * self.rng.random()
        x, y = x - 0.11 * np.cos(heading), y - 0.11 * np.sin(heading)
        trunk = self.vessel(x, y, heading, 0.24, 0.0125, 2.0)
        parts = [trunk]
        for side in (-1, 1, -1):
            bx, by = trunk[self.rng.integers(len(trunk) // 5, len(trunk)), :2]
            parts.append(self.vessel(bx, by, heading + side * self.rng.uniform(0.7, 1.3), 0.12, 0.010, 2.0))
        self.add("irma", np.concatenate(parts), edge=0.008, opacity=self.rng.uniform(0.75, 0.95))

    def venous_beading(self, quadrant):
        """Sausage-like swellings along a stretch of the vein that runs through the quadrant."""
        inside = [v[[quadrant_of(*p) == quadrant and np.hypot(*p) < FIELD for p in v]] for v in self.veins]
        vein = max(inside, key=len)
        length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(vein, axis=0).T))])
        start = self.rng.uniform(0.1, 0.3) * length[-1]
        s = np.arange(start, min(start + 0.38, 0.95 * length[-1]), 0.010)
        swell = 0.5 + 0.5 * np.sin(2 * np.pi * s / self.rng.uniform(0.065, 0.085))
        r = 0.011 + 0.019 * swell**1.5
        x, y = np.interp(s, length, vein[:, 0]), np.interp(s, length, vein[:, 1])
        self.add("venous_beading", np.stack([x, y, r, r, 0 * r], 1), edge=0.010, opacity=self.rng.uniform(0.75, 0.95))

    def neovascularization(self):
        """A fan of fine new vessels with loops, grown from one point."""
        spread = self.rng.uniform(0.17, 0.23)
        x, y = self.place(spread, gap=0.0)
        heading, n = 2 * np.pi * self.rng.random(), self.rng.integers(11, 16)
        parts = []
        for i in range(n):
            fan = heading + (i / (n - 1) - 0.5) * self.rng.uniform(4.5, 6.0)
            parts.append(self.vessel(x, y, fan, spread * self.rng.uniform(0.6, 1.0), 0.0085, 2.6))
            bx, by = parts[-1][len(parts[-1]) // 2, :2]
            parts.append(self.vessel(bx, by, fan + self.rng.choice([-1.2, 1.2]), 0.45 * spread, 0.0075, 2.6))
        self.add("neovascularization", np.concatenate(parts), edge=0.008, opacity=self.rng.uniform(0.75, 0.95))

    def preretinal_hemorrhage(self):
        r = self.rng.uniform(0.12, 0.21)
        x, y = self.place(r, gap=0.0, field=0.85)
        blob = (x, y - 0.3 * r, r, 0.8 * r, 0.0)
        self.add(
            "preretinal_hemorrhage", blob, wobble=0.03, edge=0.014, opacity=self.rng.uniform(0.85, 0.95), flat=True
        )


def _chosen(rng: np.random.Generator, chances: dict[str, float]) -> list[str]:
    """Each name by its own chance, at least one."""
    while True:
        chosen = [name for name, p in chances.items() if rng.random() < p]
        if chosen:
            return chosen


def plan_lesions(
    rng: np.random.Generator, grade: int, optic_disc: tuple[float, float, float], veins: list[np.ndarray]
) -> list[Lesion]:
    """The lesions of one eye.

    - 0: none.
    - 1, mild: microaneurysms only.
    - 2, moderate: microaneurysms and at least one of hemorrhages (fewer than 20 in the eye), hard and soft exudates;
      venous beading in at most one quadrant.
    - 3, severe: as 2, and at least one of: more than 20 hemorrhages in each quadrant, venous beading in two or more
      quadrants, IRMA in one or more (the 4-2-1 rule).
    - 4, proliferative: as 2 or 3, and neovascularization, preretinal hemorrhage or both.

    optic_disc: (x, y, radius), kept free. veins: polylines [P, 2] that beading follows, one through each quadrant at
    least.
    """
    plan = _Planner(rng, optic_disc, veins)
    if grade == 4:
        for sign in _chosen(rng, {"neovascularization": 0.75, "preretinal_hemorrhage": 0.5}):
            getattr(plan, sign)()
    severe = grade == 3 or (grade == 4 and rng.random() < 0.4)
    if severe:
        signs = _chosen(rng, {"hemorrhages": 0.6, "venous_beading": 0.5, "irma": 0.5})
        if "irma" in signs:
            for quadrant in rng.permutation(4)[: rng.integers(1, 4)]:
                plan.irma(quadrant)
        if "venous_beading" in signs:
            for quadrant in rng.permutation(4)[: rng.integers(2, 5)]:
                plan.venous_beading(quadrant)
        if "hemorrhages" in signs:
            for quadrant in range(4):
                plan.hemorrhages(rng.integers(21, 26), quadrant, largest=0.036)
    if grade >= 2:
        signs = _chosen(rng, {"hemorrhages": 0.8, "hard_exudates": 0.65, "soft_exudates": 0.4})
        if "hemorrhages" in signs:
            plan.hemorrhages(rng.integers(4, 15))
        if "hard_exudates" in signs:
            plan.hard_exudates(rng.integers(1, 4))
        if "soft_exudates" in signs:
            plan.soft_exudates(rng.integers(1, 4))
        if not severe and rng.random() < 0.1:
            plan.venous_beading(rng.integers(4))
    if grade >= 1:
        plan.microaneurysms(rng.integers(5, 15))
    return plan.lesions


def stamp(alpha: np.ndarray, lesion: Lesion) -> None:
    """Raises ``alpha`` [S, S] float32 in place to the share of each pixel that the lesion's shape covers, 0 … 1."""
    size = alpha.shape[0]
    pixel = 2 / size
    edge = max(lesion.edge, pixel)
    for x, y, along, across, angle in lesion.blobs:
        along, across = max(along, 0.75 * pixel), max(across, 0.75 * pixel)  # so that it covers a pixel at any size
        mean = np.sqrt(along * across)
        reach = 1.3 * max(along, across) + edge
        x0, x1 = (int(np.clip((c + 1) / pixel, 0, size)) for c in (x - reach, x + reach + pixel))
        y0, y1 = (int(np.clip((c + 1) / pixel, 0, size)) for c in (y - reach, y + reach + pixel))
        dx = ((np.arange(x0, x1, dtype=np.float32) + 0.5) * pixel - 1 - x)[None, :]
        dy = ((np.arange(y0, y1, dtype=np.float32) + 0.5) * pixel - 1 - y)[:, None]
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / along
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / across
        rho = np.sqrt(u * u + v * v)  # 1 on the outline
        if len(lesion.wobble):
            theta = np.arctan2(v, u)
            rho /= 1 + sum(a * np.cos((k + 2) * theta + phase) for k, (a, phase) in enumerate(lesion.wobble))
        cover = 0.5 - (rho - 1) * mean / edge
        if lesion.flat:
            cover = np.minimum(cover, 0.5 + (dy + 0 * dx) / edge)
        window = alpha[y0:y1, x0:x1]
        np.maximum(window, np.clip(cover, 0, 1), out=window)


def paint(picture: np.ndarray, lesions: list[Lesion], keep: np.ndarray) -> dict[str, np.ndarray]:
    """Paints lesions into ``picture`` [S, S, 3] float32 in 0 … 1, in place, and returns a mask for each kind painted.

    keep: bool [S, S], False where nothing may be painted. A mask (bool [S, S]) holds the pixels that the shapes cover
    by at least one half, whatever the lesion's opacity.
    """
    masks = {}
    for kind, (how, tint) in _LOOK.items():
        cover = np.zeros(keep.shape, np.float32)
        opacity = np.zeros(keep.shape, np.float32)
        for lesion in (one for one in lesions if one.kind == kind):
            shape = np.zeros(keep.shape, np.float32)
            stamp(shape, lesion)
            np.maximum(cover, shape, out=cover)
            np.maximum(opacity, lesion.opacity * shape, out=opacity)
        cover *= keep
        if not (cover >= 0.5).any():
            continue
        a = (opacity * keep)[..., None]
        tint = np.asarray(tint, np.float32)
        picture *= 1 - a * (1 - tint) if how == "absorb" else 1 - a
        if how == "cover":
            picture += a * tint
        masks[kind] = cover >= 0.5
    return masks
