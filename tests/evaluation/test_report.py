"""The HTML page is one well-formed file that needs no other, with runs side by side on the same pictures."""

import base64
import html
import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from _datasets import write_idrid_segmentation_tree
from _runs import write_run
from PIL import Image

from ercn import cli
from ercn.checkpoint import load_model
from ercn.config import EvaluateConfig, PrepareConfig, ReportConfig
from ercn.data import prepare
from ercn.maps import NAMES
from ercn.report.evaluation import read_evaluations
from ercn.report.model_card import write_model_card
from ercn.report.page import report, write_report
from ercn.report.table import print_metrics, reading
from ercn.training import evaluate

VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """Elements with their attributes; raises where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def decoded(uri):
    head, data = uri.split(",", 1)
    return head, base64.b64decode(data, validate=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    small = {"size": 64, "workers": 1, "progress": False}
    prepare(PrepareConfig(out=str(root / "phantom"), patients=12, fractions=(0.3, 0.4, 0.3), **small))
    write_run(root / "gated" / "run", root / "phantom")
    write_run(root / "plain" / "run", root / "phantom", seed=1, pool="plain", targets="onehot")
    write_idrid_segmentation_tree(root / "raw")
    options = {"dataset": "idrid_segmentation", "root": str(root / "raw"), "fractions": (0.5, 0.5, 0)}
    prepare(PrepareConfig(out=str(root / "idrid"), **options, **small))
    return root


@pytest.fixture(scope="module")
def compared(root):
    runs = (str(root / "gated" / "run"), str(root / "plain" / "run"))
    return report(ReportConfig(runs=runs, out=str(root / "c.html"))).read_text()


def test_the_page_is_one_well_formed_file_that_needs_no_network(compared):
    page = Page(compared)
    for tag, attributes in page.elements:
        for name in ("src", "href", "data", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    bare = re.sub(r"base64,[\w+/=]+", "", compared)
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|import\(", bare)
    assert "Not a medical device" in compared and "are a <strong>phantom</strong>" in compared
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_picture_can_be_decoded_and_says_what_it_shows(compared):
    page = Page(compared)
    assert len(page.all("img")) > 20
    for image in page.all("img"):
        assert image["alt"]
        head, data = decoded(image["src"])
        if "svg" in head:
            assert data.startswith(b"<?xml") and data.rstrip().endswith(b"</svg>")
        else:
            Image.open(io.BytesIO(data)).load()
    for canvas in page.all("canvas"):
        assert {f"data-{name}" for name in NAMES} == canvas.keys()
        for uri in canvas.values():
            assert Image.open(io.BytesIO(decoded(uri)[1])).mode == "L"


def test_runs_are_named_apart_and_their_settings_compared(compared):
    assert "gated/run" in compared and "plain/run" in compared and "Settings that differ" in compared
    rows = re.findall(r"<code>([\w.]+)</code></th><td>(.*?)</td><td>(.*?)</td>", compared)
    assert rows == [("model.targets", "ordinal", "onehot"), ("model.pool", "gated", "plain"), ("run.seed", "0", "1")]


def test_values_are_those_of_the_evaluations(root, compared):
    for name in ("gated", "plain"):
        result = json.loads((root / name / "run" / "evaluation" / "val.json").read_text())
        for entry in (result["metrics"]["kappa"], result["localization"]["maps"]["cam"]["aupr"]):
            assert f"{entry['value']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})" in compared


def test_references_differences_and_healthy_eyes_are_told_with_what_masks_chose(root, compared):
    gated = read_evaluations(root / "gated" / "run")[0]["val"]
    local, healthy, fixed = gated.localization, gated.healthy, gated.grading.fixed_specificity["0.95"]
    shown = [local.references["contrast"]["aupr"], local.maps["cam"]["froc"], local.differences[0]["froc"]]
    shown += [local.lesions["hemorrhages"].maps["attention"]["recall"], healthy.maps["mean"]["area"]]
    shown += [fixed["roc_sensitivity"], fixed["sensitivity"]]
    one = write_report(root / "gated" / "run").read_text()
    Page(one)
    for page in (one, compared):
        for entry in shown:
            assert reading(entry) in page
        assert gated.disclosure in html.unescape(page) and "masks of val of phantom chose" in html.unescape(page)
        assert f"the unlearned filter {local.contrast}" in page and "refined CAM − CAM" in page
        assert 'alt="FROC by lesion. ' in page
        assert f"Pictures of grade 0 without a lesion: {healthy.pictures}." in page


def test_the_terminal_tells_the_same(root, capsys):
    gated = read_evaluations(root / "gated" / "run")[0]["val"]
    print_metrics(gated)
    text = " ".join(capsys.readouterr().out.split())
    for part in ("heat on healthy eyes", "references: maps that no model", "paired differences", "FROC score"):
        assert part in text
    assert gated.disclosure in text


def test_the_same_picture_of_both_runs_is_one_case(root, compared):
    cases = compared.split('<div class="case"')[1:]
    gallery = json.loads((root / "gated" / "run" / "evaluation" / "val.json").read_text())["gallery"]
    assert len(cases) == len(gallery) > 5
    for case in cases:
        first, second = re.findall(r'class="base".*?src="(data:image/jpeg[^"]*)"', case)
        assert first == second and "gated/run" in case and "plain/run" in case
    assert not re.search(r"p\d{4}_(left|right)", compared)  # no picture's id


def test_runs_on_other_pictures_are_told_apart(root, tmp_path):
    shutil.copytree(root / "gated" / "run", tmp_path / "other")
    path = tmp_path / "other" / "evaluation" / "val.json"
    path.write_text(path.read_text().replace('"manifest": "', '"manifest": "0', 1))
    runs = (str(root / "plain" / "run"), str(tmp_path / "other"))
    page = report(ReportConfig(runs=runs, out=str(tmp_path / "c.html"))).read_text()
    gallery = json.loads(path.read_text())["gallery"]
    assert "not evaluated on the same pictures" in page and page.count('<div class="case"') == 2 * len(gallery)


def test_one_run_and_a_set_without_grades(root):
    run = root / "gated" / "run"
    options = {"workers": 0, "bootstrap": 20, "progress": False}
    evaluate(EvaluateConfig(run=str(run), data=str(root / "idrid"), split="all", **options))
    page = write_report(run).read_text()
    Page(page)
    assert page.index("Results on idrid_segmentation-all") < page.index("Results on val")
    ungraded = page[page.index("Results on idrid") : page.index("Results on val")]
    assert "Heat maps against" in ungraded and "Confusion" not in ungraded and ">truth" not in ungraded
    assert "Settings that differ" not in page


def test_wrong_input_is_named(root, tmp_path, capsys):
    with pytest.raises(ValueError, match="runs is empty"):
        report(ReportConfig())
    with pytest.raises(FileNotFoundError, match="phantom is no run of ercn"):
        report(ReportConfig(runs=(str(root / "phantom"),)))
    with pytest.raises(ValueError, match="is a folder"):
        report(ReportConfig(runs=("x",), out=str(tmp_path)))
    with pytest.raises(ValueError, match="the same run is named twice"):
        report(ReportConfig(runs=(str(root / "plain" / "run"),) * 2))


def test_evaluations_of_an_older_version_are_told_and_left_out(root, tmp_path, capsys):
    old = shutil.copytree(root / "plain" / "run", tmp_path / "old")
    path = old / "evaluation" / "val.json"
    shutil.copy(path, path.with_name("test.json"))
    assert [list(part) for part in read_evaluations(old)] == [["test", "val"], []]
    path.write_text(path.read_text().replace('"disclosure"', '"before"'))
    capsys.readouterr()
    report(ReportConfig(runs=(str(old),), out=str(tmp_path / "report.html")))
    assert f"{path} was written by an older version of ercn and is left out" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "Results on test" in page and "Results on val" not in page
    card = write_model_card(old, load_model(old)[1]).read_text()
    assert "of an older version of the software: evaluation/val.json" in card
    assert "No external data set has been evaluated" not in card


@pytest.mark.parametrize("change", [{"geometry": 99}, {"config": {"of_a_later_version": 1}}])
def test_a_run_that_cannot_be_loaded_is_compared(root, tmp_path, change):
    newer = shutil.copytree(root / "plain" / "run", tmp_path / "newer")
    path = newer / "export" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 1.5, "epoch": 77} | change))
    with pytest.raises(ValueError, match="geometry 99|of_a_later_version"):
        load_model(newer)
    runs = (str(root / "gated" / "run"), str(newer))
    page = report(ReportConfig(runs=runs, out=str(tmp_path / "c.html"))).read_text()
    row = r"newer</span></th><td>phantom</td><td>mobilenetv3_small_050</td>\s*<td>64</td><td>77</td><td>1.50</td>"
    assert re.search(row, page)


@pytest.mark.parametrize("keys", ["views", "metrics", "roc", "localization lesions", "localization floor", "healthy"])
def test_a_key_that_an_evaluation_lacks_is_named(root, tmp_path, keys):
    path = tmp_path / "evaluation" / "val.json"
    path.parent.mkdir()
    part = values = json.loads((root / "plain" / "run" / "evaluation" / "val.json").read_text())
    *above, key = keys.split()
    for name in above:
        part = part[name]
    del part[key]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged: it lacks {key!r}")):
        read_evaluations(tmp_path)


def test_runs_are_named_without_an_option():
    parse = cli.parse("report", ReportConfig, ["a b", "c", "--out", "x.html"])
    assert parse == ReportConfig(("a b", "c"), "x.html")
    assert cli.parse("report", ReportConfig, ["--runs", '["a"]']) == ReportConfig(("a",))
