"""The model card says what the run's files say, and names what they do not."""

import json
import re

import pytest
from _runs import write_run

from ercn.checkpoint import load_model
from ercn.config import PrepareConfig
from ercn.data import Manifest, prepare
from ercn.report.model_card import NOT_PROVIDED, write_model_card


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("card")
    options = {"size": 64, "workers": 1, "progress": False}
    prepare(PrepareConfig(out=str(root / "data"), patients=12, fractions=(0.4, 0.6, 0), **options))
    return write_run(root / "run", root / "data")


def card(run):
    return write_model_card(run, load_model(run)[1]).read_text()


def test_values_come_from_the_run(run):
    text = card(run)
    model = json.loads((run / "export" / "model.json").read_text())
    result = json.loads((run / "evaluation" / "val.json").read_text())
    assert "Not a medical device" in text and "**phantom**" in text
    kappa = result["metrics"]["kappa"]
    assert f"| Quadratic weighted kappa | {kappa['value']:.3f} ({kappa['low']:.3f} to {kappa['high']:.3f})" in text
    aupr = result["localization"]["lesions"]["microaneurysms"]["maps"]["attention"]["aupr"]
    assert f"{aupr['value']:.3f} ({aupr['low']:.3f} to {aupr['high']:.3f})" in text
    assert model["manifest"] in text and f"temperature {model['temperature']:.3f}" in text
    for split, count in (("train", 4), ("val", 8), ("test", 0)):
        records = Manifest.load(model["config"]["data"]["root"]).split(split)
        grades = [sum(r.grade == k for r in records) for k in range(5)]
        row = " | ".join(map(str, [len(records), len({r.patient for r in records}), *grades]))
        assert f"| {split} | {row} |" in text
    assert "**No external data set has been evaluated.**" in text


def test_every_item_of_both_lists_is_answered_or_named_as_missing(run):
    text = card(run)
    answered, missing = text.split("## Not provided")
    heads = " ".join(re.findall(r"^## .*\((.*)\)$", answered, re.MULTILINE))
    claim = {int(n) for n in re.findall(r"C(\d+)", heads)} | set(range(23, 28))  # "C23 to C27"
    tripod = {int(n) for n in re.findall(r"T(\d+)", heads)}
    for item, c, t in NOT_PROVIDED:
        assert f"| {item} |" in missing
        claim |= {int(n) for n in re.findall(r"\d+", c)}
        tripod |= {int(n) for n in re.findall(r"(\d+)", t)}
    assert claim == set(range(1, 43)) and tripod == set(range(1, 28))


def test_the_tables_are_tables_and_no_id_is_told(run):
    text = card(run)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = block.strip().split("\n")
        assert len({row.count("|") for row in rows}) == 1 and set(rows[1]) <= set("|- "), rows[0]
    assert not re.search(r"p\d{4}", text) and str(run.parent) not in text


@pytest.mark.parametrize("layout, words", [
    ("ercn pretrain", "contrastive pre-training, run `simclr`."),
    ("ercn train", "the backbone's weights from `model.safetensors` (ercn train; 9 tensors, 1 interpolated, 0 missing"),
])  # fmt: skip
def test_what_the_backbone_started_from(run, layout, words):
    path = run / "export" / "model.json"
    text = path.read_text()
    assert "- Start: random weights." in card(run)
    model = json.loads(text)
    model["config"]["init"] = "/data/runs/simclr/"
    model["pretrained"] = {"source": "/data/runs/simclr/export/model.safetensors", "layout": layout, "sha256": "ab"}
    model["pretrained"] |= {"tensors": 9, "resized": {"pos_embed": ""}, "missing": [], "unused": {}, "prefix": ""}
    path.write_text(json.dumps(model))
    try:
        assert f"- Start: {words}" in card(run)
    finally:
        path.write_text(text)
