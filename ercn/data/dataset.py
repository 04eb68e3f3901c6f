"""Prepared pictures as tensors, augmented by a pure function of (seed, epoch, index)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2

from ercn.data.entries import OPTIC_DISC
from ercn.data.images import DataError, read_picture
from ercn.data.manifest import Record

logger = logging.getLogger(__name__)


def _pixels(picture: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(picture).transpose(2, 0, 1).copy())


def _resized(pixels: torch.Tensor, size: int) -> torch.Tensor:
    return v2.functional.resize(pixels, [size, size], antialias=True)


def _normalized(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    return v2.functional.normalize(pixels.float() / 255, list(mean), list(std))


def to_tensor(picture: Image.Image, image_size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """An RGB picture as the network sees it in evaluation: float32 [3, S, S], (x / 255 - mean) / std."""
    return _normalized(_resized(_pixels(picture), image_size), mean, std)


def _on(surround: int, turn: v2.Transform, pixels: torch.Tensor) -> torch.Tensor:
    """The picture turned on a ground of the level ``surround``; torchvision's ``fill`` leaves a dark seam around it."""
    return (turn(pixels.float() - surround) + surround).round().to(torch.uint8)


def training_transform(image_size: int, surround: int = 0) -> v2.Transform:
    """Mild: flips, up to 20 degrees, 5 % shift, 10 % scale, and color jitter; uint8 [3, H, W] to [3, S, S].

    surround: the level beyond the picture. Where it is not black, the local mean has been removed, and with it the
    brightness, which then is not varied.
    """
    bilinear = v2.InterpolationMode.BILINEAR
    return v2.Compose([
        v2.Resize([image_size, image_size], antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        partial(_on, surround, v2.RandomAffine(20, translate=(0.05, 0.05), scale=(0.9, 1.1), interpolation=bilinear)),
        v2.ColorJitter(0 if surround else 0.2, 0.2, 0.2, 0.02),
    ])  # fmt: skip


def contrastive_transform(image_size: int, surround: int = 0) -> v2.Transform:
    """SimCLR's views, suited to fundus photographs; uint8 [3, H, W] to [3, S, S]. surround: as in training_transform.

    The crop keeps at least 40 % of the area, and hue and blur are weaker than for natural pictures: lesions are small,
    and color distinguishes blood from exudate. Both flips and any small rotation are natural for a retina.
    """
    return v2.Compose([
        v2.RandomResizedCrop(image_size, scale=(0.4, 1.0), ratio=(0.9, 1.1), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        partial(_on, surround, v2.RandomRotation(45, interpolation=v2.InterpolationMode.BILINEAR)),
        v2.RandomApply([v2.ColorJitter(0 if surround else 0.4, 0.4, 0.3, 0.05)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(5, sigma=(0.1, 1.0))], p=0.3),
    ])  # fmt: skip


class PictureDataset(Dataset):
    """Pictures of some records.

    Args:
        records: as ``Manifest.split`` returns them. image_size: S, side of the tensors.
        mean, std: RGB, in 0 … 1, that the pictures are normalized with.
        augment: vary the pictures (``training_transform``, or ``contrastive_transform`` if ``contrastive``).
        surround: level around the disc (``ercn.data.normalization.surround``), which turned pictures are filled with.
        views: tensors for each picture, varied independently.
        max_unreadable: how many pictures may be skipped, counted over all workers of this data set.
        with_masks: also return the masks of ``mask_kinds``; not with ``augment``.
        cache_bytes: decoded pictures that each worker keeps in memory.

    An item is ``{"image": float32 [3, S, S], "grade": int, "index": int}``, the grade -1 where there is none; with
    ``views`` > 1 it has ``"views"`` [V, 3, S, S] in place of ``"image"``; ``with_masks`` adds ``"masks"`` bool
    [M, S, S], one for each of ``mask_kinds``: the lesions that any of the records has, then the optic disc. A picture
    that cannot be read is logged by name and gives None, which ``collate`` drops; one too many raises DataError with
    all their names.

    A view depends on (seed, epoch, index, number of the view) only, not on the worker or on what was read before.
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool,
        surround: int = 0,
        views: int = 1,
        seed: int = 0,
        max_unreadable: int = 10,
        contrastive: bool = False,
        with_masks: bool = False,
        cache_bytes: int = 2**28,
    ) -> None:
        if with_masks and augment:
            raise ValueError("with_masks needs augment=False: lesion masks are not augmented")
        self.records = list(records)
        self.image_size, self.mean, self.std = image_size, tuple(mean), tuple(std)
        self.views, self.seed, self.max_unreadable, self.with_masks = views, seed, max_unreadable, with_masks
        self.mask_kinds = (*sorted({kind for record in self.records for kind in record.masks}), OPTIC_DISC)
        self.transform: v2.Transform | None = None
        if augment:
            self.transform = (contrastive_transform if contrastive else training_transform)(image_size, surround)
        # In shared memory: workers see a new epoch, and count unreadable pictures together.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._unreadable = torch.zeros(len(self.records), dtype=torch.bool).share_memory_()
        self._cache: dict[int, torch.Tensor] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return len(self.records)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose augmentations follow, also in workers that are running."""
        self._epoch.fill_(epoch)

    def unreadable(self) -> list[Record]:
        """The records that could not be read so far, in any worker."""
        return [self.records[i] for i in self._unreadable.nonzero().flatten().tolist()]

    def faults(self) -> dict[str, str]:
        """The fault of each unreadable record, by id, from reading it again."""
        faults = {}
        for record in self.unreadable():
            try:
                read_picture(record.image, max_pixels=record.geometry.size**2)
                faults[record.id] = "could not be read at first"
            except DataError as error:
                faults[record.id] = str(error).removeprefix(f"{record.image}: ")
        return faults

    def check_unreadable(self) -> None:
        """Raises DataError with the names if more pictures than ``max_unreadable`` could not be read in any worker."""
        skipped = self.unreadable()
        if len(skipped) > self.max_unreadable:
            names = ", ".join(str(record.image) for record in skipped)
            raise DataError(f"{len(skipped)} unreadable pictures, max_unreadable is {self.max_unreadable}: {names}")

    def __getitem__(self, index: int) -> dict | None:
        record = self.records[index]
        try:
            pixels = self._read(index)
            masks = self._masks(record) if self.with_masks else None
        except DataError as error:
            self._skip(index, error)
            return None
        views = [self._view(pixels, index, view) for view in range(self.views)]
        item = {"image": views[0]} if self.views == 1 else {"views": torch.stack(views)}
        item |= {"grade": -1 if record.grade is None else record.grade, "index": index}
        if masks is not None:
            item["masks"] = masks
        return item

    def _read(self, index: int) -> torch.Tensor:
        if index in self._cache:
            return self._cache[index]
        record = self.records[index]
        pixels = _pixels(read_picture(record.image, max_pixels=record.geometry.size**2))
        if pixels.numel() <= self._room:
            self._room -= pixels.numel()
            self._cache[index] = pixels
        return pixels

    def _view(self, pixels: torch.Tensor, index: int, view: int) -> torch.Tensor:
        if self.transform is None:
            return _normalized(_resized(pixels, self.image_size), self.mean, self.std)
        state = np.random.SeedSequence([self.seed, int(self._epoch), index, view]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(state[0]))
            return _normalized(self.transform(pixels), self.mean, self.std)

    def _masks(self, record: Record) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        result = torch.zeros(len(self.mask_kinds), *size, dtype=torch.bool)
        for i, kind in enumerate(self.mask_kinds):
            if path := record.optic_disc if kind == OPTIC_DISC else record.masks.get(kind):
                mask = read_picture(path, max_pixels=record.geometry.size**2).convert("L")
                result[i] = torch.from_numpy(np.array(mask.resize(size, Image.Resampling.NEAREST)) > 0)
        return result

    def _skip(self, index: int, error: DataError) -> None:
        if not self._unreadable[index]:
            self._unreadable[index] = True
            logger.warning("skipped: %s", error)
        self.check_unreadable()


def collate(items: Sequence[dict | None]) -> dict | None:
    """Stacks the items that could be read; None if there is none."""
    readable = [item for item in items if item is not None]
    return default_collate(readable) if readable else None
