"""Exported networks predict as ercn does, in processes without ercn and, for ONNX, without torch."""

import csv
import json
import os
import re
import struct
import subprocess
import sys
import sysconfig
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from _pictures import FRAMES, framed
from _stubs import info_of
from PIL import Image
from scipy import ndimage
from torch import nn

from ercn import export as exporting
from ercn import standalone
from ercn.checkpoint import save_model
from ercn.config import ExportConfig, ModelConfig, PredictConfig, TrainConfig
from ercn.data import locate_disc
from ercn.data.phantom import render_phantom
from ercn.evaluation.calibration import temper
from ercn.evaluation.predicting import RawPictures
from ercn.models import ERCN, grade_probabilities
from ercn.training import export, predict

ROOT = Path(__file__).parents[2]
SITE = Path(sysconfig.get_path("platlib"))
MODEL = ModelConfig(backbone="test_resnet", embed_dim=8, pool_dim=8, pamr_reach=0.03, pamr_steps=4)
INFO = info_of(
    TrainConfig(model=MODEL),
    image_size=65,
    prepared_size=96,
    mean=[0.4, 0.3, 0.2],
    std=[0.2, 0.25, 0.3],
    thresholds={"referable": 0.4, "maps": {"cam": 0.3}},
    normalize="local",
    temperature=1.7,
)
# EXIF data of a picture that must be turned, with an invalid resolution: a signed byte of 200
DAMAGED = b"Exif\0\0II*\0" + struct.pack("<LH HHLL HHLL L", 8, 2, 0x112, 3, 1, 6, 0x11A, 6, 1, 200, 0)


def random_network(config):
    """A network whose grades and maps differ between pictures."""
    torch.manual_seed(0)
    model = ERCN(config).eval()
    with torch.no_grad():
        model.prior.copy_(torch.tensor([1.0, 0.5, -0.5, -1.0])[: len(model.prior)])
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
    return model


@cache
def picture(number):
    return framed(render_phantom(number, "left", number % 5, 120, 0)[0], number)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a network that was never trained, pictures, and what ``ercn predict`` makes of them."""
    root = tmp_path_factory.mktemp("run")
    save_model(root / "run", random_network(MODEL), INFO)
    (root / "run" / "export" / "model_card.md").write_text("A card.\n")
    for number in range(6):
        path = root / "pictures" / ("b" if number % 2 else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    picture(7).convert("L").save(root / "pictures" / "grey.jpg")
    upright = Image.Exif()
    upright[0x0112] = 6  # to be turned
    picture(8).save(root / "pictures" / "grey.tiff", exif=upright)
    Image.new("RGB", (90, 70), (9, 9, 9)).save(root / "pictures" / "flat.bmp")
    (root / "pictures" / "broken.png").write_bytes(b"none")
    picture(9).save(root / "pictures" / "damaged.jpg", exif=DAMAGED)
    options = {"workers": 0, "accelerator": "cpu", "overlays": (), "progress": False}
    predict(PredictConfig(str(root / "run"), str(root / "pictures"), str(root / "predictions"), **options))
    return root


@pytest.fixture(scope="module")
def traced():
    return []


@pytest.fixture
def program(traced, monkeypatch):
    """The network is traced once for all formats."""
    whole = exporting.exported_program

    def once(network, side):
        if not traced:
            traced.append(whole(network, side))
        return traced[0]

    monkeypatch.setattr(exporting, "exported_program", once)


def predict_outside(folder, run, packages, cwd):
    """predict.py of an exported folder in a Python that has these packages only."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, packages))}
    command = [sys.executable, "-S"]
    absent = "import importlib.util as u; print(*(n for n in ('ercn', 'torch', 'scipy') if u.find_spec(n)))"
    has = subprocess.run([*command, "-c", absent], env=environment, cwd=cwd, capture_output=True, text=True, check=True)
    done = subprocess.run(
        [*command, str(folder / "predict.py"), str(run / "pictures"), "alone"],
        env=environment, cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return has.stdout.split(), done


def same_predictions(found, expected):
    with open(found / "predictions.csv") as ours, open(expected / "predictions.csv") as theirs:
        rows, wanted = list(csv.DictReader(ours)), list(csv.DictReader(theirs))
    assert [row["id"] for row in rows] == [row["id"] for row in wanted]
    assert len({row["p4"] for row in wanted}) > 5  # equal predictions would show nothing
    for row, right in zip(rows, wanted):
        assert list(row) == list(right) and (row["file"], row["grade"]) == (right["file"], right["grade"])
        values = [[float(value) for name, value in r.items() if re.fullmatch(r"p\d", name)] for r in (row, right)]
        np.testing.assert_allclose(*values, rtol=0, atol=1e-5)
        name = f"maps/{row['id']}.npz"
        with np.load(found / name) as ours, np.load(expected / name) as theirs:
            assert list(ours) == list(theirs)
            for key, value in theirs.items():
                assert ours[key].dtype == value.dtype or key.startswith("geometry") or key == "corners"
                np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-4, err_msg=key, equal_nan=False)


def session_of(folder):
    import onnxruntime

    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def test_onnx_predicts_with_onnxruntime_numpy_and_pillow_alone(run, program, tmp_path):
    folder = export(ExportConfig(str(run / "run"), "onnx", str(tmp_path / "exported")))
    assert sorted(p.name for p in folder.iterdir()) == ["export.json", "model.onnx", "model_card.md", "predict.py"]
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("numpy", "numpy.libs", "PIL", "pillow.libs", "onnxruntime"):
        (packages / name).symlink_to(SITE / name)
    has, done = predict_outside(folder, run, [packages], tmp_path)
    assert not has
    assert "9 pictures graded, 2 unreadable" in done.stdout
    for name, fault in {"broken.png": "cannot identify image file", "damaged.jpg": "argument out of range"}.items():
        assert re.search(rf"unreadable, skipped: .*{name}: cannot be decoded: {fault}", done.stderr)
    same_predictions(tmp_path / "alone", run / "predictions")

    about = json.loads((folder / "export.json").read_text())
    for name in ("temperature", "thresholds", "class_names", "manifest"):
        assert about[name] == getattr(INFO, name)
    assert about["preprocessing"] == {"max_pixels": 200_000_000} | {
        name: getattr(INFO, name) for name in ("prepared_size", "normalize", "image_size", "mean", "std")
    }
    assert about["network"]["outputs"]["probability"] == ["batch", 5] and about["model_card"] == "model_card.md"
    assert "medical device" in about["notice"] and about["maps"]["corners"] == 65
    assert {"torch", "onnx", "onnxscript", "onnx-ir"} <= set(about["packages"])

    session = session_of(folder)
    image = np.random.default_rng(0).normal(size=(3, 3, 65, 65)).astype(np.float32)
    whole = session.run(None, {"image": image})
    assert [output.name for output in session.get_outputs()] == list(about["network"]["outputs"])
    assert [list(x.shape) for x in whole] == [[3, *shape[1:]] for shape in about["network"]["outputs"].values()]
    for i in range(3):
        for one, many in zip(session.run(None, {"image": image[i : i + 1]}), whole):
            np.testing.assert_allclose(one[0], many[i], rtol=0, atol=1e-5)
    command = [sys.executable, folder / "predict.py", "x", folder]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode and "is not an empty folder, and nothing is overwritten" in done.stderr


def test_pt2_predicts_with_torch_without_ercn(run, program, tmp_path):
    folder = export(ExportConfig(str(run / "run"), "pt2", str(tmp_path / "exported")))
    has, _ = predict_outside(folder, run, [SITE], tmp_path)
    assert has == ["torch", "scipy"]
    same_predictions(tmp_path / "alone", run / "predictions")


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_aoti_predicts_in_a_process_without_python(run, program, tmp_path):
    """Runs the program and command of docs/export.md. Without vectors, compiling takes half the time."""
    with torch._inductor.config.patch({"compile_threads": 1, "cpp.simdlen": 1}):
        folder = export(ExportConfig(str(run / "run"), "aoti", str(tmp_path / "exported")))
    (tmp_path / "main.cpp").write_text(code_blocks("cpp")[0])
    (build,) = re.findall(r"^g\+\+ .*", code_blocks("sh")[1], re.MULTILINE)
    subprocess.run(build.replace("$T", torch.__path__[0]), shell=True, cwd=tmp_path, check=True)

    predict_outside(folder, run, [SITE], tmp_path)
    same_predictions(tmp_path / "alone", run / "predictions")

    predictor = standalone.Predictor(folder)
    prepared, whole = [], predictor.run
    predictor.run = lambda image: prepared.append(image) or whole(image)
    paths = sorted((run / "pictures" / "b").iterdir())
    for path in paths:
        predictor(path)
    (tmp_path / "image.raw").write_bytes(np.concatenate(prepared).tobytes())
    command = [tmp_path / "probabilities", folder / "model.aoti.pt2", "65", "image.raw"]
    environment = {"PATH": os.environ["PATH"], "LD_DEBUG": "files"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "libtorch_cpu" in done.stderr and "python" not in re.sub(r"/\S*/", "", done.stderr)
    found = np.array([line.split() for line in done.stdout.splitlines()], float)
    with open(run / "predictions" / "predictions.csv") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    wanted = [[float(rows[str(path)][f"p{k}"]) for k in range(5)] for path in paths]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_the_examples_of_the_page_run():
    example = next(block for block in code_blocks("python") if "decompositions" in block)
    names = {}
    exec(example, names)  # noqa: S102
    assert names["pooled"].shape == (5, 1, 64) and names["scores"].shape == (5, 1, 100)
    assert not [node for node in names["plain"].graph.nodes if "ercn" in str(node.target)]


@pytest.mark.parametrize(
    "changes, side",
    [
        ({"cam_pool": "topk", "evidence": "additive", "targets": "onehot", "refine_stride": 8, "mask": "hard"}, 65),
        ({"patch": 32, "cam_pool": "gem", "evidence": "classwise", "confidence": "relative"}, 64),
    ],
)
def test_other_networks_are_exported(changes, side):
    config = replace(MODEL, refinement=("affinity",), **changes)
    network = exporting.Predicting(random_network(config), config, 1.0).eval()
    program = exporting.exported_program(network, side)
    assert not [node for node in program.graph.nodes if "ercn" in str(node.target)]
    image = torch.randn(3, 3, side, side)
    with torch.no_grad():
        found, expected = program.module()(image), network(image)
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


def test_attention_is_written_as_onnx(tmp_path):
    """MaxViT takes views of the output of attention, which fail on that of fused attention."""
    kwargs = {"img_size": 64, "block_type": ["C", "C", "C", "M"]}
    config = replace(MODEL, backbone="test_maxvit", backbone_kwargs=kwargs, output_stride=32, refinement=())
    network = random_network(config)
    save_model(tmp_path / "run", network, replace(INFO, config=TrainConfig(model=config), image_size=64))
    folder = export(ExportConfig(str(tmp_path / "run"), "onnx", str(tmp_path / "exported")))
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = exporting.Predicting(network, config, INFO.temperature)(image)
    found = session_of(folder).run(list(expected), {"image": image.numpy()})
    for (name, value), output in zip(expected.items(), found):
        np.testing.assert_allclose(output, value.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


class Small(nn.Module):
    """A network of one weight and one function."""

    def __init__(self, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.arange(65.0)), function

    def forward(self, image):
        return {"probability": self.function(image * self.weight)}


def small_program(function):
    batch = torch.export.Dim("batch")
    program = torch.export.export(Small(function), (torch.ones(2, 3, 65, 65),), dynamic_shapes=({0: batch},))
    return lambda network, side: program.run_decompositions({})


def test_large_weights_lie_beside_the_onnx_file(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "exported_program", small_program(torch.neg))
    monkeypatch.setattr(torch.onnx._internal.exporter._onnx_program, "_LARGE_MODEL_THRESHOLD", 0)
    folder = export(ExportConfig(str(run / "run"), "onnx", str(tmp_path / "exported")))
    assert {"model.onnx", "model.onnx.data"} < {path.name for path in folder.iterdir()}
    image = np.ones((1, 3, 65, 65), np.float32)
    (found,) = session_of(folder).run(None, {"image": image})
    np.testing.assert_array_equal(found, -image * np.arange(65, dtype=np.float32))


def test_what_onnx_cannot_hold_is_a_sentence(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "exported_program", small_program(torch.special.bessel_j0))
    with pytest.raises(ValueError, match="run cannot be written as onnx: No ONNX function found for .*bessel") as error:
        export(ExportConfig(str(run / "run"), "onnx", str(tmp_path / "out")))
    assert str(error.value).isprintable()


def test_colours_and_what_torch_adds_are_left_out_of_a_sentence():
    error = torch.onnx.errors.OnnxExporterError("Failed.\n\nNext steps:")
    error.__cause__ = ValueError("\n\x1b[96mA view\x1b[0m fails.\nWhile executing")
    assert exporting._line(error) == "A view fails."
    error = ValueError("A sentence of ours")
    error.__cause__ = AssertionError("what it explains")
    assert exporting._line(error) == "A sentence of ours"
    assert exporting._line(KeyError()) == "KeyError"


def test_pillows_limit_is_as_it_was_after_a_picture(run, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow refuses twice as many
    assert standalone.read_picture(run / "pictures" / "flat.bmp", 90 * 90).size == (90, 70)
    with pytest.raises(ValueError, match="cannot be decoded"):
        standalone.read_picture(run / "pictures" / "broken.png", 90 * 90)
    with pytest.raises(ValueError, match="90 x 70 is too large; max_pixels is 8099"):
        standalone.read_picture(run / "pictures" / "flat.bmp", 8099)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("targets", ["ordinal", "onehot", "referable"])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_probabilities_are_those_of_predict(targets, temperature):
    config = replace(MODEL, targets=targets, refinement=())
    model = random_network(config)
    image = torch.randn(4, 3, 65, 65)
    with torch.no_grad():
        found = exporting.Predicting(model, config, temperature)(image)["probability"].numpy()
        expected = temper(grade_probabilities(model(image).logits.double(), config).numpy(), temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalize", ["none", "graham", "local"])
@pytest.mark.parametrize("prepared, side", [(64, 64), (96, 65), (64, 97), (130, 65)])
def test_the_script_makes_the_same_input_of_a_picture(normalize, prepared, side, tmp_path):
    info = replace(INFO, normalize=normalize, prepared_size=prepared, image_size=side)
    paths = []
    for number in range(2 * len(FRAMES)):
        paths.append(tmp_path / f"{number}.jpg")
        picture(number).save(paths[-1])
    about = {
        "network": {"file": "model.onnx", "format": "onnx", "outputs": {"probability": []}},
        "preprocessing": {"max_pixels": 10**8, **vars(info)},
        "maps": {"names": {}},
    }
    predictor = standalone.Predictor.__new__(standalone.Predictor)
    predictor.about, predictor.names, seen = about, ["probability"], []
    predictor.run = lambda image: seen.append(image) or [[0]]
    for path, item in zip(paths, RawPictures(paths, info, 10**8)):
        _, _, geometry = predictor(path)
        assert geometry == item["geometry"].__dict__
        np.testing.assert_array_equal(seen.pop()[0], item["image"].numpy())


def discs(count):
    """Photographs of discs, blots and noise, with and without a dark border, of all sizes."""
    random = np.random.default_rng(0)
    for _ in range(count):
        height, width = random.integers(20, 850, 2)
        y, x = np.mgrid[:height, :width]
        level = np.full((height, width), random.uniform(0, 40))
        for _ in range(random.integers(0, 4)):
            center, radius = random.uniform(0, (height, width)), random.uniform(5, 400)
            distance = np.hypot(y - center[0], x - center[1])
            level[(distance < radius) & (distance > random.uniform(0, 0.8) * radius)] = random.uniform(20, 255)
        noise = random.normal(scale=random.uniform(0, 25), size=(height, width, 3))
        colored = level[..., None] * random.uniform(0.3, 1, 3)
        yield Image.fromarray(np.clip(colored + noise, 0, 255).astype(np.uint8))


def test_the_script_finds_the_same_disc():
    found = set()
    for photograph in discs(24):
        geometry = locate_disc(photograph)
        assert standalone.locate_disc(photograph) == (geometry.left, geometry.top, geometry.side)
        found.add(geometry.side == max(photograph.size))
    assert found == {True, False}


def test_the_script_labels_parts_as_scipy_does():
    random = np.random.default_rng(0)
    masks = [random.random(random.integers(1, 40, 2)) < random.uniform(0.2, 0.9) for _ in range(60)]
    for mask in [*masks, np.zeros((3, 4), bool), np.ones((4, 3), bool)]:
        parts, areas = standalone.label(mask)
        expected, count = ndimage.label(mask)
        np.testing.assert_array_equal(parts, expected)
        assert areas.tolist() == np.bincount(expected.ravel(), minlength=count + 1)[1:].tolist()


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty folder, and nothing is overwritten: give another --out"):
        export(ExportConfig(str(run / "run"), "onnx", str(tmp_path)))
    with pytest.raises(ValueError, match="is not an empty folder"):
        export(ExportConfig(str(run / "run"), "onnx", str(tmp_path / "notes.txt")))


def test_a_run_without_weights_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing; ercn train writes it"):
        export(ExportConfig(str(tmp_path / "nothing"), "onnx", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_missing_packages_and_compilers_are_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnx and onnxscript: pip install 'ercn\[export\]'") as error:
        export(ExportConfig(str(run / "run"), "onnx", str(tmp_path / "out")))
    assert error.value.name == "onnx"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="format aoti needs a C\\+\\+ compiler, and there is no no-such-compiler"):
        export(ExportConfig(str(run / "run"), "aoti", str(tmp_path / "out")))


def test_what_cannot_be_exported_is_a_sentence(run, tmp_path, monkeypatch):
    class Judging(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    whole = exporting.load_model

    def with_judgement(path):
        model, info = whole(path)
        model.backbone.register_forward_pre_hook(lambda module, args: (Judging()(args[0]),))
        return model, info

    monkeypatch.setattr(exporting, "load_model", with_judgement)
    with pytest.raises(ValueError, match="backbone test_resnet cannot be exported: .*data-dependent") as error:
        export(ExportConfig(str(run / "run"), "pt2", str(tmp_path / "out")))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
