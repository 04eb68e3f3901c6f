import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from ercn.config import PrepareConfig
from ercn.data import DataError, Manifest, PictureDataset, collate, prepare
from ercn.data.dataset import contrastive_transform, to_tensor, training_transform


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom") / "data"
    return Manifest.load(
        prepare(PrepareConfig(out=str(out), size=64, patients=20, workers=1, progress=False, fractions=(1.0, 0, 0)))
    )


def dataset(manifest, size=48, augment=False, **options):
    return PictureDataset(manifest.records, size, mean=manifest.mean, std=manifest.std, augment=augment, **options)


def broken(manifest, folder, count):
    """The records, the first ``count`` with files that cannot be read."""
    records = list(manifest.records)
    for i in range(count):
        path = folder / f"bad{i}.png"
        path.write_bytes(records[i].image.read_bytes()[: 300 * (i % 2)])
        records[i] = replace(records[i], image=path)
    return records


def test_a_plain_item_is_the_normalized_picture(manifest):
    item = dataset(manifest, 64)[3]
    record = manifest.records[3]
    pixels = np.asarray(Image.open(record.image)).transpose(2, 0, 1) / 255
    expected = (pixels - np.array(manifest.mean)[:, None, None]) / np.array(manifest.std)[:, None, None]
    assert item["image"].dtype == torch.float32 and set(item) == {"image", "grade", "index"}
    np.testing.assert_allclose(item["image"], expected, atol=1e-5)
    assert (item["grade"], item["index"]) == (record.grade, 3)


def test_resizing_is_that_of_to_tensor(manifest):
    picture = Image.open(manifest.records[0].image)
    torch.testing.assert_close(dataset(manifest, 40)[0]["image"], to_tensor(picture, 40, manifest.mean, manifest.std))


@pytest.mark.parametrize("contrastive", [False, True])
def test_views_depend_on_seed_epoch_index_and_view_alone(manifest, contrastive):
    options = {"augment": True, "views": 2, "contrastive": contrastive}
    one, other = dataset(manifest, seed=1, **options), dataset(manifest, seed=1, **options)
    for data in (one, other):
        data.set_epoch(4)
    first = [one[i]["views"] for i in (0, 1, 2)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = [other[i]["views"] for i in (2, 1, 0)][::-1]
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is left alone
    assert first[0].shape == (2, 3, 48, 48)
    for a, b in zip(first, again):
        assert torch.equal(a, b) and not torch.equal(a[0], a[1])
    other.set_epoch(5)
    assert not torch.equal(other[0]["views"], first[0])
    assert not torch.equal(
        dataset(manifest, seed=2, **options)[0]["views"], dataset(manifest, seed=1, **options)[0]["views"]
    )
    assert all(torch.isfinite(view).all() for view in first)


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_see_the_epoch_and_repeat_the_main_process(manifest, context, workers):
    data = dataset(manifest, augment=True, seed=3)
    data.records = data.records[:6]
    loader = DataLoader(
        data, 2, num_workers=workers, collate_fn=collate, persistent_workers=True, multiprocessing_context=context
    )
    for epoch in (0, 1):
        data.set_epoch(epoch)
        from_workers = torch.cat([batch["image"] for batch in loader])
        assert torch.equal(from_workers, torch.stack([data[i]["image"] for i in range(6)]))


def test_augmentation_is_mild_and_contrast_is_not(manifest):
    plain = dataset(manifest)
    mild, strong = dataset(manifest, augment=True), dataset(manifest, augment=True, contrastive=True)

    def color_shift(data):
        return np.mean([(data[i]["image"] - plain[i]["image"]).mean((1, 2)).abs().mean().item() for i in range(20)])

    assert 0.01 < color_shift(mild) < color_shift(strong) < 1.0


@pytest.mark.parametrize("transform", [training_transform, contrastive_transform])
def test_where_the_local_mean_is_gone_gray_stays_gray(transform):
    """A gray surround stays gray without a seam in turned pictures; on a black surround brightness varies."""
    gray = torch.full((3, 40, 40), 128, dtype=torch.uint8)
    even, black = transform(40, 128), transform(40)
    levels, corners = [], []
    torch.manual_seed(0)
    for _ in range(24):
        assert ((even(gray).float() - 128).abs() <= 3).all()  # each jitter may lose a level
        view = black(gray)
        levels.append(view[:, 20, 20].float().mean().item())
        corners.append(int(view[:, (0, 0, -1, -1), (0, -1, 0, -1)].min()))
    assert np.ptp(levels) > 20 and 0 in corners


def test_where_the_local_mean_is_gone_contrast_is_varied(manifest):
    options = {"augment": True, "surround": 128}
    data = PictureDataset(manifest.records, 48, mean=manifest.mean, std=manifest.std, **options)
    first = data[0]["image"]
    data.set_epoch(1)
    assert not torch.equal(data[0]["image"], first)
    assert not torch.equal(dataset(manifest, augment=True)[0]["image"], first)


def test_masks_are_those_of_the_lesions_and_of_the_optic_disc(manifest):
    data = dataset(manifest, 64, with_masks=True)
    *kinds, disc = data.mask_kinds
    assert disc == "optic_disc" and set(kinds) == {kind for record in manifest.records for kind in record.masks}
    for i, record in enumerate(manifest.records):
        masks = data[i]["masks"]
        assert masks.dtype == torch.bool and masks.shape == (len(kinds) + 1, 64, 64)
        for kind, mask in zip(data.mask_kinds, masks.numpy()):
            path = record.optic_disc if kind == disc else record.masks.get(kind)
            expected = np.asarray(Image.open(path)) > 0 if path else np.zeros((64, 64), bool)
            np.testing.assert_array_equal(mask, expected)
        assert masks[:-1].any() == (record.grade > 0) and masks[-1].any()
    half = dataset(manifest, 32, with_masks=True)
    assert half[0]["masks"].shape == (len(kinds) + 1, 32, 32)
    with pytest.raises(ValueError, match="with_masks needs augment=False"):
        dataset(manifest, augment=True, with_masks=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_named_dropped_and_counted_over_workers(manifest, tmp_path, caplog, workers):
    data = PictureDataset(
        broken(manifest, tmp_path, 3), 48, mean=manifest.mean, std=manifest.std, augment=False, max_unreadable=3
    )
    with caplog.at_level(logging.WARNING, logger="ercn"):
        for _ in range(2):  # the second epoch counts none twice
            seen = [
                i
                for batch in DataLoader(data, 4, num_workers=workers, collate_fn=collate)
                for i in batch["index"].tolist()
            ]
            assert seen == list(range(3, len(data)))
    unreadable = data.unreadable()
    assert [record.image.name for record in unreadable] == ["bad0.png", "bad1.png", "bad2.png"]
    assert list(data.faults()) == [record.id for record in unreadable]
    assert all(reason and "bad" not in reason for reason in data.faults().values())  # without the path
    if not workers:
        assert [f"bad{i}.png" in message for i, message in enumerate(caplog.messages)] == [True] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_one_unreadable_picture_too_many_stops_with_all_names(manifest, tmp_path, workers):
    data = PictureDataset(
        broken(manifest, tmp_path, 3), 48, mean=manifest.mean, std=manifest.std, augment=False, max_unreadable=2
    )
    loader = DataLoader(Subset(data, [0, 5, 1, 6]), 2, num_workers=workers, collate_fn=collate)
    assert [batch["index"].tolist() for batch in loader] == [[5], [6]]
    with pytest.raises(DataError, match="3 unreadable pictures, max_unreadable is 2") as raised:
        data[2]
    assert all(f"bad{i}.png" in str(raised.value) for i in range(3))


def test_the_cache_is_bounded_and_changes_nothing(manifest):
    picture = 3 * 64 * 64
    data = dataset(manifest, cache_bytes=5 * picture)
    first = [data[i]["image"] for i in range(10)]
    assert len(data._cache) == 5
    assert all(torch.equal(a, data[i]["image"]) for i, a in enumerate(first))
    assert not torch.equal(first[0], first[1])


def test_collate_of_nothing_is_none():
    assert collate([None, None]) is None
