"""The phantom's lesions as shapes: which lesions a grade has (ICDR rules), and how they are painted.

Coordinates: the picture's half width is 1, x to the right, y down, origin in the centre, so a plan holds for any size.
Quadrants are those of the picture: 0 upper left, 1 upper right, 2 lower left, 3 lower right.

Source of the rules: Wilkinson et al. 2003, the International Clinical Diabetic Retinopathy (ICDR) severity scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import numpy as np

from ercn.data.phantom.difficulty import DIFFICULTIES, Difficulty
from ercn.data.phantom.shapes import blend, coverage

# What a lesion does to the picture below it: "absorb" multiplies RGB by the tint, "cover" replaces RGB by it.
_LOOK = {
    "venous_beading": ("absorb", (0.80, 0.32, 0.40)),
    "irma": ("absorb", (0.84, 0.32, 0.40)),
    "microaneurysms": ("absorb", (0.84, 0.28, 0.36)),
    "hemorrhages": ("absorb", (0.78, 0.22, 0.30)),
    "soft_exudates": ("cover", (1.00, 0.92, 0.78)),
    "hard_exudates": ("cover", (1.00, 0.92, 0.42)),
    "neovascularization": ("absorb", (0.86, 0.34, 0.40)),
    "preretinal_hemorrhage": ("cover", (0.46, 0.06, 0.06)),
}
LESIONS = tuple(_LOOK)
FIELD = 0.90  # lesions lie within this radius; the aperture's is 0.97


@dataclass(frozen=True)
class Lesion:
    """One lesion: an ellipse, or a chain or cluster of them.

    kind: a name from ``LESIONS``. quadrant: 0 … 3, where its center lies.
    blobs: float64 [n, 5], rows (x, y, radius along, radius across, angle). wobble: float64 [k, 2], amplitude and phase
    of the outline's harmonics 2 … k+1. edge: width over which the cover falls from 1 to 0 (at least one pixel is used).
    opacity: in (0, 1]. flat: the upper half is cut off, as of blood that settles before the retina.
    """

    kind: str
    quadrant: int
    blobs: np.ndarray
    wobble: np.ndarray
    edge: float
    opacity: float
    flat: bool = False


def quadrant_of(x, y):
    """0 … 3, of numbers or arrays."""
    return (x >= 0) + 2 * (y >= 0)


class _Planner:
    """Draws lesions at free places: inside the field, off the optic disc, apart from each other."""

    def __init__(
        self, rng: np.random.Generator, optic_disc: tuple[float, float, float], veins: list[np.ndarray], level
    ):
        self.rng = rng
        self.veins = veins
        self.contrast, self.spread = rng.uniform(*level.contrast), level.spread
        self.size = level.size
        self.taken = [optic_disc]
        self.lesions: list[Lesion] = []

    def place(self, radius: float, quadrant: int | None = None, gap: float = 0.03, field: float = FIELD):
        """A random center whose disc of ``radius`` keeps ``gap`` to all others.

        Each time that 64 draws find no place, the gap is halved; from the 40th time on discs may overlap, by 0.01 more
        each time.
        """
        for tried in count(1):
            r, a = (field - radius) * np.sqrt(self.rng.random(64)), 2 * np.pi * self.rng.random(64)
            x, y = r * np.cos(a), r * np.sin(a)
            if quadrant is not None:  # off the axes, so that a lesion lies in one quadrant
                x = (np.abs(x) + radius) * (1 if quadrant % 2 else -1)
                y = (np.abs(y) + radius) * (1 if quadrant >= 2 else -1)
            taken = np.array(self.taken)
            apart = np.hypot(x[:, None] - taken[:, 0], y[:, None] - taken[:, 1]) > radius + gap + taken[:, 2]
            free = np.flatnonzero(apart.all(1) & (np.hypot(x, y) <= field - radius))
            if len(free):
                self.taken.append((x[free[0]], y[free[0]], radius))
                return self.taken[-1][:2]
            gap = gap / 2 if tried < 40 else gap - 0.01

    def beside(self, radius: float, gap: float, cluster: float):
        """A free place, or with chance ``cluster`` a place where the lesion flows together with the last one."""
        if len(self.taken) > 1 and self.rng.random() < cluster:
            x, y, last = self.taken[-1]
            a, d = 2 * np.pi * self.rng.random(), self.rng.uniform(0.6, 1.3) * (radius + last)
            x, y = x + d * np.cos(a), y + d * np.sin(a)
            dx, dy, disc = self.taken[0]
            if np.hypot(x, y) < FIELD - radius and np.hypot(x - dx, y - dy) > disc + radius:
                self.taken.append((x, y, radius))
                return x, y
        return self.place(radius, gap=gap)

    def many(self, least: float, most: float) -> int:
        """A log-uniform count."""
        return int(least * ((most + 1) / least) ** self.rng.random())

    def opacity(self) -> float:
        return self.contrast * (1 - self.spread * self.rng.random())

    def add(self, kind, blobs, *, edge, opacity, wobble=0.0, flat=False):
        blobs = np.atleast_2d(np.asarray(blobs, float))
        blobs = blobs[np.hypot(*blobs[:, :2].T) < FIELD]  # winding vessels may leave the field
        amplitude = wobble * self.rng.normal(size=3) / np.arange(1, 4)
        shape = np.stack([amplitude, 2 * np.pi * self.rng.random(3)], 1) if wobble else np.zeros((0, 2))
        x, y = blobs[:, :2].mean(0)
        self.lesions.append(Lesion(kind, int(quadrant_of(x, y)), blobs, shape, edge, opacity, flat))

    def microaneurysms(self, number):
        for _ in range(number):
            r = self.size * self.rng.uniform(0.0155, 0.021)
            x, y = self.beside(r, 0.03, 0.15)
            self.add("microaneurysms", (x, y, r, r, 0), edge=0.008, opacity=self.opacity())

    def hemorrhages(self, number, quadrant=None, largest=0.045):
        for _ in range(number):
            r = self.size * 0.020 * (largest / 0.020) ** (self.rng.random() ** 1.5)  # many dots, few blots
            x, y = self.beside(r, 0.008, 0.4) if quadrant is None else self.place(r, quadrant, gap=0.008)
            flame = r > 0.028 * self.size and self.rng.random() < 0.4
            thin = self.rng.uniform(0.35, 0.5) if flame else self.rng.uniform(0.7, 1.0)
            blob = (x, y, r, thin * r, np.pi * self.rng.random())
            self.add("hemorrhages", blob, wobble=0.14, edge=0.012, opacity=self.opacity())

    def hard_exudates(self, clusters):
        for _ in range(clusters):
            spread = self.size * self.rng.uniform(0.035, 0.08)
            cx, cy = self.place(spread, field=0.75)
            ring = self.rng.random() < 0.4
            blobs = []
            for _ in range(self.rng.integers(3, 10)):
                a = 2 * np.pi * self.rng.random()
                d = spread * (self.rng.uniform(0.75, 0.95) if ring else 0.9 * np.sqrt(self.rng.random()))
                r = self.size * self.rng.uniform(0.013, 0.024)
                blobs.append(
                    (cx + d * np.cos(a), cy + d * np.sin(a), r, r * self.rng.uniform(0.6, 1), np.pi * self.rng.random())
                )
            self.add("hard_exudates", blobs, wobble=0.12, edge=0.008, opacity=self.opacity())

    def soft_exudates(self, number):
        for _ in range(number):
            r = self.size * self.rng.uniform(0.035, 0.05)
            x, y = self.place(1.3 * r, field=0.8)
            blob = (x, y, 1.2 * r, 0.8 * r, np.pi * self.rng.random())
            self.add("soft_exudates", blob, wobble=0.12, edge=0.6 * r, opacity=self.opacity())

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
        spread = self.size * self.rng.uniform(0.06, 0.12)
        x, y = self.place(spread, quadrant, gap=0.0)
        heading = 2 * np.pi * self.rng.random()
        x, y = x - 0.8 * spread * np.cos(heading), y - 0.8 * spread * np.sin(heading)
        trunk = self.vessel(x, y, heading, 2.0 * spread, 0.0115 * self.size, 2.0)
        parts = [trunk]
        for side in (-1, 1):
            bx, by = trunk[self.rng.integers(len(trunk) // 5, len(trunk)), :2]
            parts.append(
                self.vessel(bx, by, heading + side * self.rng.uniform(0.7, 1.3), spread, 0.010 * self.size, 2.0)
            )
        self.add("irma", np.concatenate(parts), edge=0.008, opacity=self.opacity())

    def stretches(self) -> list[np.ndarray]:
        """The longest stretch of a vein in each quadrant, polyline [P, 2]."""
        x, y, disc = self.taken[0]
        best = [np.zeros((0, 2))] * 4
        for vein in self.veins:
            seen = (np.hypot(vein[:, 0] - x, vein[:, 1] - y) > disc + 0.02) & (np.hypot(*vein.T) < 0.98 * FIELD)
            place = np.where(seen, quadrant_of(*vein.T), -1)
            for part in np.split(np.arange(len(vein)), np.flatnonzero(np.diff(place)) + 1):
                if place[part[0]] >= 0:
                    best[place[part[0]]] = max(best[place[part[0]]], vein[part], key=len)
        return best

    def venous_beading(self, quadrants: int):
        """Sausage-like swellings along a vein, in at most ``quadrants`` of those with a long enough vein."""
        stretches = self.stretches()
        for quadrant in [q for q in self.rng.permutation(4) if len(stretches[q]) > 17][:quadrants]:
            self._beads(stretches[quadrant])

    def _beads(self, vein):
        length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(vein, axis=0).T))])
        reach = min(self.rng.uniform(0.18, 0.30), length[-1])
        start = self.rng.random() * (length[-1] - reach)
        s = np.arange(start, start + reach, 0.010)
        swell = 0.5 + 0.5 * np.sin(2 * np.pi * s / self.rng.uniform(0.065, 0.085))
        r = self.size * (0.009 + 0.014 * swell**1.5)
        x, y = np.interp(s, length, vein[:, 0]), np.interp(s, length, vein[:, 1])
        self.add("venous_beading", np.stack([x, y, r, r, 0 * r], 1), edge=0.010, opacity=self.opacity())

    def neovascularization(self):
        """A fan of fine new vessels with loops, grown from one point."""
        spread = self.size * self.rng.uniform(0.07, 0.15)
        x, y = self.place(spread, gap=0.0)
        heading, n = 2 * np.pi * self.rng.random(), self.rng.integers(6, 11)
        parts = []
        for i in range(n):
            fan = heading + (i / (n - 1) - 0.5) * self.rng.uniform(4.5, 6.0)
            parts.append(self.vessel(x, y, fan, spread * self.rng.uniform(0.6, 1.0), 0.0085 * self.size, 2.6))
            bx, by = parts[-1][len(parts[-1]) // 2, :2]
            parts.append(
                self.vessel(bx, by, fan + self.rng.choice([-1.2, 1.2]), 0.45 * spread, 0.0075 * self.size, 2.6)
            )
        self.add("neovascularization", np.concatenate(parts), edge=0.008, opacity=self.opacity())

    def preretinal_hemorrhage(self):
        r = self.size * self.rng.uniform(0.05, 0.11)
        x, y = self.place(r, gap=0.0, field=0.85)
        blob = (x, y - 0.3 * r, r, 0.8 * r, 0.0)
        self.add("preretinal_hemorrhage", blob, wobble=0.03, edge=0.014, opacity=self.opacity(), flat=True)


def _chosen(rng: np.random.Generator, chances: dict[str, float]) -> list[str]:
    """Each name by its own chance, at least one."""
    while True:
        chosen = [name for name, p in chances.items() if rng.random() < p]
        if chosen:
            return chosen


def plan_lesions(
    rng: np.random.Generator,
    grade: int,
    optic_disc: tuple[float, float, float],
    veins: list[np.ndarray],
    level: Difficulty = DIFFICULTIES["standard"],
) -> list[Lesion]:
    """The lesions of one eye.

    - 0: none.
    - 1, mild: microaneurysms only, 2 … 45.
    - 2, moderate: at least one of hemorrhages (fewer than 20 in the eye), hard and soft exudates; venous beading in at
      most one quadrant.
    - 3, severe: at least one of: more than 20 hemorrhages in each quadrant (rare), venous beading in two or more
      quadrants, IRMA in one or more (the 4-2-1 rule).
    - 4, proliferative: neovascularization, preretinal hemorrhage or both.

    Grades 2 … 4 mostly have microaneurysms too, 3 and 4 often signs of 2, and 4 some of 3. Counts are log-uniform, so
    numbers and areas of the grades overlap: the kinds of lesions make the difference.

    optic_disc: (x, y, radius), kept free. veins: polylines [P, 2] that beading follows, spaced by about 0.01, one
    through two quadrants at least.
    """
    plan = _Planner(rng, optic_disc, veins, level)
    if grade == 4:
        for sign in _chosen(rng, {"neovascularization": 0.75, "preretinal_hemorrhage": 0.4}):
            getattr(plan, sign)()
    severe = grade == 3 or (grade == 4 and rng.random() < 0.2)
    if severe:
        signs = _chosen(rng, {"hemorrhages": 0.05, "venous_beading": 0.4, "irma": 0.6})
        if "irma" in signs:
            for quadrant in rng.permutation(4)[: rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1])]:
                plan.irma(quadrant)
        if "venous_beading" in signs:
            plan.venous_beading(rng.choice([2, 3, 4], p=[0.7, 0.2, 0.1]))
        if "hemorrhages" in signs:
            for quadrant in range(4):
                plan.hemorrhages(rng.integers(21, 24), quadrant, largest=0.030)
    if grade == 2 or (grade > 2 and rng.random() < 0.3):
        signs = _chosen(rng, {"hemorrhages": 0.65, "hard_exudates": 0.55, "soft_exudates": 0.35})
        if "hemorrhages" in signs:
            plan.hemorrhages(plan.many(1, 19))
        if "hard_exudates" in signs:
            plan.hard_exudates(rng.integers(1, 3))
        if "soft_exudates" in signs:
            plan.soft_exudates(rng.integers(1, 3))
        if not severe and rng.random() < 0.1:
            plan.venous_beading(1)
    if grade == 1:
        plan.microaneurysms(int(2 + 44 * rng.random() ** 1.5))
    elif grade and rng.random() < 0.8:
        plan.microaneurysms(plan.many(1, 28))
    return plan.lesions


def paint(picture: np.ndarray, lesions: list[Lesion], keep: np.ndarray) -> dict[str, np.ndarray]:
    """Paints lesions into ``picture`` [S, S, 3] float64 in 0 … 1, in place, and returns a mask for each kind painted.

    keep: bool [S, S], False where nothing may be painted. A mask (bool [S, S]) holds the pixels that the shapes cover
    by at least one half, whatever the lesion's opacity.
    """
    size = len(picture)
    masks = {}
    for kind, (how, tint) in _LOOK.items():
        chosen = [one for one in lesions if one.kind == kind]
        if not chosen:
            continue
        blobs = np.concatenate([one.blobs for one in chosen])
        blobs[:, 2:4] = np.maximum(blobs[:, 2:4], 1.5 / size)  # each covers a pixel at any size
        number = [len(one.blobs) for one in chosen]
        edge, opacity, flat = (np.repeat([getattr(o, n) for o in chosen], number) for n in ("edge", "opacity", "flat"))
        wobble = np.repeat([one.wobble for one in chosen], number, 0)
        shape = {"wobble": wobble if wobble.size else None, "flat": flat if flat.any() else None}
        mask = keep & (coverage(size, blobs, edge, **shape) >= 0.5)
        if mask.any():
            blend(picture, how, tint, keep * coverage(size, blobs, edge, opacity, **shape))
            masks[kind] = mask
    return masks
