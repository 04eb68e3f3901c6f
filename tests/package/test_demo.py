"""The demo's configurations fit together, and its photographs look like a camera's. `make demo` runs it."""

from __future__ import annotations

from pathlib import Path

from ercn import demo
from ercn.config import preset
from ercn.data import Geometry, locate_disc, read_picture


def test_each_step_reads_what_the_one_before_writes(tmp_path):
    prepared, pretrained, trained, evaluated, predicted = demo.configs(tmp_path)
    assert prepared.out == pretrained.data.root == trained.data.root
    assert prepared.size == trained.data.image_size
    assert pretrained.run.out == trained.init and pretrained.backbone == trained.model.backbone
    assert trained.run.out == evaluated.run == predicted.run
    assert trained.model == preset("demo").model and trained.loss == preset("demo").loss
    places = prepared.out, trained.run.out, predicted.input, predicted.out
    assert all(Path(place).is_relative_to(tmp_path) for place in places)


def test_photographs_are_off_centre_and_their_disc_is_found(tmp_path):
    demo.write_photographs(tmp_path, 2)
    pictures = sorted(tmp_path.iterdir())
    assert [p.name for p in pictures] == ["photograph_0_grade_0.jpg", "photograph_1_grade_1.jpg"]
    for i, path in enumerate(pictures):
        geometry = locate_disc(read_picture(path, max_pixels=10**6))
        assert isinstance(geometry, Geometry) and (geometry.width, geometry.height) == (720, 540)
        assert abs(geometry.left - (60 + 20 * i)) <= 12 and abs(geometry.side - 512) <= 24
