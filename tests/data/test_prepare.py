import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _pictures import read_rows, write_csv, write_davis_tree, write_eyepacs_tree
from PIL import Image

import ercn
from ercn.config import PrepareConfig
from ercn.data import DataError, Manifest, locate_disc, prepare, read_picture, render_phantom

SMALL = {"size": 64, "workers": 1, "progress": False}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom") / "data"
    return prepare(PrepareConfig(out=str(out), patients=30, **SMALL))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree") / "eyepacs"
    write_eyepacs_tree(root, patients=10)
    return root


@pytest.fixture
def eyepacs(tree, tmp_path):
    """A fresh copy of the tree, by links, whose files can be replaced."""
    root = tmp_path / "eyepacs"
    (root / "train").mkdir(parents=True)
    for path in tree.rglob("*.*"):
        os.link(path, root / path.relative_to(tree))
    return root


def config(root, out, **options):
    return PrepareConfig(
        dataset="eyepacs", root=str(root), out=str(out), fractions=(0.8, 0.2, 0.0), **(SMALL | options)
    )


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def put(path, content):
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def test_phantom_folder(phantom, capsys):
    manifest = Manifest.load(phantom)
    assert (manifest.dataset, manifest.size, len(manifest.class_names)) == ("phantom", 64, 5)
    assert len(manifest.records) == 60 and [len(manifest.split(s)) for s in ("train", "val", "test")] == [42, 6, 12]
    grades = {}
    for record in manifest.records:
        number, eye = int(record.patient[1:]), record.id.split("_")[1]
        picture, masks = render_phantom(number, eye, record.grade, 64, 0)
        np.testing.assert_array_equal(np.asarray(Image.open(record.image)), picture)
        assert set(record.masks) == set(masks)
        for kind, path in record.masks.items():
            np.testing.assert_array_equal(np.asarray(Image.open(path)), masks[kind] * np.uint8(255))
        assert np.asarray(Image.open(record.optic_disc)).max() == 255
        grades.setdefault(record.patient, []).append(record.grade)
    assert all(len(g) == 2 and abs(g[0] - g[1]) <= 1 for g in grades.values())
    x = np.stack([np.asarray(Image.open(r.image)) for r in manifest.split("train")]) / 255
    np.testing.assert_allclose(manifest.mean, x.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(manifest.std, x.std((0, 1, 2)), rtol=1e-6)


def test_the_same_settings_give_the_same_bytes_with_any_number_of_workers(phantom, tmp_path):
    again = prepare(PrepareConfig(out=str(tmp_path / "d"), patients=30, **(SMALL | {"workers": 2})))
    assert contents(again) == contents(phantom)


def test_the_folder_can_be_moved(phantom, tmp_path):
    for name, content in contents(phantom).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    moved = Manifest.load(tmp_path)
    assert moved.hash == Manifest.load(phantom).hash and all(r.image.is_relative_to(tmp_path) for r in moved.records)
    assert str(phantom.parent) not in "".join(p.read_text() for p in tmp_path.glob("*.*"))


def test_summary(tmp_path, capsys, caplog):
    prepare(PrepareConfig(out=str(tmp_path / "d"), patients=6, **SMALL))
    text = capsys.readouterr()
    assert "phantom: 12 pictures of 6 patients, 64 x 64" in text.out and "proliferative" in text.out
    assert text.err == ""  # no progress bar where there is no terminal
    assert "no picture of grade 0 (no DR), 2 (moderate)" in caplog.text
    assert "no picture in the val split, although its fraction is 0.1" in text.out


def test_eyepacs_pictures_and_geometry(tree, tmp_path):
    manifest = Manifest.load(prepare(config(tree, tmp_path / "d")))
    assert len(manifest.records) == 20 and not any(r.masks for r in manifest.records)
    labels = {row["image"]: int(row["level"]) for row in read_rows(tree / "trainLabels.csv")}
    assert {r.id: r.grade for r in manifest.records} == labels
    for record in manifest.records:
        picture = read_picture(tree / record.source, max_pixels=10**6)
        assert record.geometry == locate_disc(picture, 64)
        near = np.asarray(Image.open(record.image), int) - np.asarray(record.geometry.crop(picture), int)
        assert np.abs(near).mean() < 3  # JPEG
    for patient in {r.patient for r in manifest.records}:
        assert len({r.split for r in manifest.records if r.patient == patient}) == 1


def test_the_publishers_test_split_is_kept(tmp_path):
    write_eyepacs_tree(tmp_path / "e", patients=10, test=True)
    manifest = Manifest.load(prepare(replace(config(tmp_path / "e", tmp_path / "d"), max_unreadable=0)))
    usage = {row["image"]: row["Usage"] for row in read_rows(tmp_path / "e" / "retinopathy_solution.csv")}
    for record in manifest.records:
        assert record.split == {None: "train", "Public": "val", "Private": "test"}[usage.get(record.id)]


def test_davis(tmp_path):
    write_davis_tree(tmp_path / "d", patients=8)
    hashes = set()
    for label in ("one_figure", "concatenated"):
        options = {"root": str(tmp_path / "d"), "out": str(tmp_path / label), "fractions": (0.6, 0, 0.4)}
        made = prepare(PrepareConfig(dataset="davis", label=label, **options, **SMALL))
        manifest = Manifest.load(made)
        assert manifest.class_names == ["NDR", "SDR", "PPDR", "PDR"] and len(manifest.records) == 24
        assert {r.patient for r in manifest.split("train")}.isdisjoint(r.patient for r in manifest.split("test"))
        hashes.add(manifest.hash)
    assert len(hashes) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_pictures_are_named_skipped_and_listed(eyepacs, tmp_path, capsys, workers):
    bad = sorted((eyepacs / "train").iterdir())[:4]
    put(bad[0], bad[0].read_bytes()[:2000])
    put(bad[1], b"not a picture")
    bad[2].unlink()
    large = Image.new("RGB", (1200, 1000))
    bad[3].unlink()
    large.save(bad[3])
    before = {
        r.id: r.split
        for r in Manifest.load(prepare(config(eyepacs, tmp_path / "d", max_pixels=10**6, workers=workers))).records
    }
    about = json.loads((tmp_path / "d" / "prepare.json").read_text())
    reasons = {one["source"]: one["reason"] for one in about["skipped"]}
    assert set(reasons) == {f"train/{path.name}" for path in bad} and len(before) == 16
    parts = ("cannot be decoded", "not a picture", "no such file", "1440000 pixels; max_pixels is 1000000")
    printed = capsys.readouterr().err
    for path, part in zip(bad, parts):
        assert part in reasons[f"train/{path.name}"] and f"skipped train/{path.name}: " in printed

    # one too many: an error that names them
    with pytest.raises(DataError, match="4 pictures cannot be read, max_unreadable is 3") as raised:
        prepare(config(eyepacs, tmp_path / "d3", max_pixels=10**6, max_unreadable=3, workers=workers))
    assert all(str(path) in str(raised.value) for path in bad)

    # repaired pictures join in the next run, and the splits of the others do not change
    Image.new("RGB", (50, 50), (90, 40, 20)).save(bad[2])
    after = {r.id: r.split for r in Manifest.load(prepare(config(eyepacs, tmp_path / "d", max_pixels=10**6))).records}
    assert set(after) - set(before) == {bad[2].stem} and before.items() <= after.items()


def test_missing_pictures_are_reported_before_the_work(eyepacs, tmp_path):
    for path in (eyepacs / "train").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="20 pictures cannot be read, max_unreadable is 10") as raised:
        prepare(config(eyepacs, tmp_path / "d"))
    assert f"{eyepacs / 'train' / '10_left.jpeg'}: no such file; " in str(raised.value)
    assert not (tmp_path / "d").exists()


def test_a_finished_folder_stays_usable_when_the_photographs_are_gone(eyepacs, tmp_path):
    before = Manifest.load(prepare(config(eyepacs, tmp_path / "d")))
    for path in (eyepacs / "train").iterdir():
        path.unlink()
    assert Manifest.load(prepare(config(eyepacs, tmp_path / "d"))) == before  # nothing is read anew
    for path in (tmp_path / "d" / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="20 pictures cannot be read"):
        prepare(config(eyepacs, tmp_path / "d"))
    assert Manifest.load(tmp_path / "d") == before  # not marked as unfinished


def test_a_grade_without_pictures_is_named(eyepacs, tmp_path):
    put(eyepacs / "trainLabels.csv", b"")
    write_csv(eyepacs / "trainLabels.csv", "image,level", [(f"{i}_left", i % 3) for i in range(10, 20)])
    with pytest.raises(DataError, match=rf"{eyepacs}: no picture of grade 3 \(severe\)"):
        prepare(config(eyepacs, tmp_path / "d"))
    assert not (tmp_path / "d").exists()


def test_a_grade_whose_pictures_cannot_be_read_is_named(eyepacs, tmp_path):
    for row in read_rows(eyepacs / "trainLabels.csv"):
        if row["level"] == "4":
            put(eyepacs / "train" / f"{row['image']}.jpeg", b"")
    with pytest.raises(DataError, match=r"no picture of grade 4 \(proliferative\)"):
        prepare(config(eyepacs, tmp_path / "d"))


def test_a_patient_in_the_publishers_two_splits_is_named(tmp_path):
    write_eyepacs_tree(tmp_path, patients=5, test=True)
    rows = [(row["image"], row["level"]) for row in read_rows(tmp_path / "trainLabels.csv")]
    test = read_rows(tmp_path / "retinopathy_solution.csv")[0]["image"]
    write_csv(tmp_path / "trainLabels.csv", "image,level", [*rows, (test, 0)])
    with pytest.raises(DataError, match=f"patient '{test.split('_')[0]}' is in the splits 'train' and"):
        prepare(config(tmp_path, tmp_path / "d"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 96}, r"size=64 \(now 96\)"),
        ({"seed": 1}, r"seed=0 \(now 1\)"),
        ({"patients": 31}, r"patients=30 \(now 31\)"),
        ({"fractions": (0.5, 0.2, 0.3)}, r"fractions=\[0.7, 0.1, 0.2\] \(now \[0.5, 0.2, 0.3\]\)"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(phantom, change, words):
    before = contents(phantom)
    with pytest.raises(DataError, match=f"prepared with other settings: .*{words}"):
        prepare(PrepareConfig(out=str(phantom), **({"patients": 30} | SMALL | change)))
    assert contents(phantom) == before


def test_other_labels_in_the_same_folder_are_refused(eyepacs, tmp_path):
    prepare(config(eyepacs, tmp_path / "d"))
    rows = read_rows(eyepacs / "trainLabels.csv")
    put(eyepacs / "trainLabels.csv", b"")
    write_csv(eyepacs / "trainLabels.csv", "image,level", [tuple(row.values()) for row in rows[1:]])
    with pytest.raises(DataError, match="other settings: the labels or the list of pictures were others"):
        prepare(config(eyepacs, tmp_path / "d"))


def test_other_photographs_under_the_same_labels_are_refused(eyepacs, tmp_path):
    before = contents(prepare(config(eyepacs, tmp_path / "d")))
    one, gone = eyepacs / "train" / "10_left.jpeg", eyepacs / "train" / "10_right.jpeg"
    size, content = one.stat().st_size, one.read_bytes() + b"0"
    put(one, content)
    gone.unlink()
    words = f"d was prepared from other photographs: images/10_left.jpg from {size} bytes, {one} has {size + 1}; choose"
    with pytest.raises(DataError, match=words):
        prepare(config(eyepacs, tmp_path / "d"))
    assert contents(tmp_path / "d") == before  # nor is it marked as unfinished
    (tmp_path / "d" / "images" / "10_left.jpg").unlink()
    assert len(Manifest.load(prepare(config(eyepacs, tmp_path / "d"))).records) == 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 16}, "size must be at least 32"),
        ({"out": ""}, "out must be the folder"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"patients": 3}, "at least 5 patients"),
        ({"dataset": "retinas"}, "dataset must be 'phantom' or one of 'eyepacs', 'davis'.*; got 'retinas'"),
        ({"dataset": "eyepacs"}, "root must be the folder"),
        ({"fractions": (1.0, 1.0, 1.0)}, "fractions must be three numbers"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        prepare(PrepareConfig(**({"out": str(tmp_path / "d")} | SMALL | options)))
    assert not (tmp_path / "d").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("text")
    with pytest.raises(DataError, match="is not empty and was not written by"):
        prepare(PrepareConfig(out=str(tmp_path), patients=6, **SMALL))
    with pytest.raises(DataError, match="is a file"):
        prepare(PrepareConfig(out=str(tmp_path / "thesis.txt"), patients=6, **SMALL))
    assert contents(tmp_path) == {"thesis.txt": b"text"}


def test_a_killed_run_goes_on(phantom, tmp_path):
    """After SIGKILL the folder is refused until a second run finishes it, with the bytes of an undisturbed run."""
    out = tmp_path / "d"
    code = (
        "from ercn.config import PrepareConfig; from ercn.data import prepare\n"
        f"prepare(PrepareConfig(out={str(out)!r}, patients=30, size=64, workers=1, progress=False))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(ercn.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    while len(list(out.glob("images/p*.png"))) < 5:  # without a temporary file
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("images/p*.png")}
    assert 5 <= len(kept) < 60
    with pytest.raises(DataError, match="was interrupted here; run it again"):
        Manifest.load(out)
    (out / "images" / ".tmp-1-p0030_left.png").write_bytes(b"half")
    prepare(PrepareConfig(out=str(out), patients=30, **SMALL))
    assert contents(out) == contents(phantom)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_damaged_picture_of_an_earlier_run_is_made_again(phantom, tmp_path):
    out = tmp_path / "d"
    settings = PrepareConfig(out=str(out), patients=30, **SMALL)
    for name, content in contents(phantom).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"" if name == "images/p0001_left.png" else content)
    prepare(settings)
    assert contents(out) == contents(phantom)


@pytest.fixture
def copy(phantom, tmp_path):
    for name, content in contents(phantom).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def edit(path, row, **values):
    rows = read_rows(path)
    rows[row] |= values
    write_csv(path, ",".join(rows[0]), [tuple(r.values()) for r in rows])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"split": "elsewhere"}, "row 2: column 'split': 'elsewhere' is not one of train, val, test"),
        ({"grade": "2.0"}, "row 2: column 'grade': '2.0' is not one of 0, 1, 2, 3, 4"),
        ({"left": "x"}, "row 2: column 'left': 'x' is not an integer"),
        ({"id": "p0001_right"}, "row 3: column 'id': 'p0001_right' again; first in row 2"),
        ({"patient": "p0002"}, "split is not the one saved in splits.json|patient 'p0002' is in the splits"),
        ({"source": "x"}, "SHA-256 differs"),
    ],
)
def test_a_changed_manifest_is_refused(copy, values, words):
    edit(copy / "manifest.csv", 0, **values)
    with pytest.raises(DataError, match=words):
        Manifest.load(copy)


def test_a_patient_moved_to_two_splits_is_named(copy):
    was = read_rows(copy / "manifest.csv")[0]["split"]
    edit(copy / "manifest.csv", 0, split="val" if was == "train" else "train")
    with pytest.raises(DataError, match="patient 'p0001' is in the splits"):
        Manifest.load(copy)


def test_a_folder_that_is_none_is_reported(copy, tmp_path_factory):
    with pytest.raises(DataError, match="is not a folder that `ercn prepare` wrote"):
        Manifest.load(tmp_path_factory.mktemp("empty"))
    (copy / "splits.json").unlink()
    with pytest.raises(DataError, match="splits.json: no such file"):
        Manifest.load(copy)
    (copy / "prepare.json").write_text("{")
    with pytest.raises(DataError, match="prepare.json: not JSON"):
        Manifest.load(copy)
    with pytest.raises(DataError, match="not a file that `ercn prepare` wrote"):
        prepare(PrepareConfig(out=str(copy), patients=30, **SMALL))
