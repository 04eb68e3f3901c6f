"""Combinations of settings that work, and error sentences for those that do not."""

from dataclasses import replace

import pytest
import torch
from _stubs import info_of

from ercn.checkpoint import save_model
from ercn.config import DataConfig, LossConfig, ModelConfig, PredictConfig, RunConfig, TrainConfig
from ercn.elements import resize
from ercn.evaluation import froc
from ercn.evaluation.localization import Localization
from ercn.losses import add_background
from ercn.maps import heat_maps, maps_of
from ercn.models import ERCN, dilations
from ercn.nn import PixelAdaptiveRefinement
from ercn.training import predict
from ercn.training.fit import check_batchnorm
from ercn.training.planning import changes, footprint

SMALL = ModelConfig(backbone="test_resnet", output_stride=8, embed_dim=8, pool_dim=8, refinement=("affinity",))
EVIDENCE = ("shared", "classwise", "additive", "separate")


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return ERCN(replace(SMALL, **changes))


def pictures(*size):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


def test_pamr_follows_the_affinity_at_the_size_of_the_picture_and_not_while_training():
    affinity = build().eval()
    model = build(refinement=("affinity", "pamr"), pamr_steps=2, pamr_reach=0.1).eval()
    image = pictures(65, 97)
    before, after = affinity(image).refined_cam, model(image).refined_cam
    pamr = PixelAdaptiveRefinement(dilations(65, 0.1), 2)
    expected = add_background(pamr(resize(before[:, 1:], (65, 97), True), image))
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(after, resize(before, (65, 97), True), atol=1e-3)
    assert torch.equal(model.train()(image).refined_cam, affinity.train()(image).refined_cam)


def test_the_affinity_comes_first():
    with pytest.raises(ValueError, match=r"'affinity' before 'pamr'.*got \['pamr', 'affinity'\]"):
        build(refinement=("pamr", "affinity"))


@pytest.mark.parametrize("targets", ["ordinal", "onehot", "referable"])
@pytest.mark.parametrize("evidence", EVIDENCE)
@pytest.mark.parametrize("confidence", ["absolute", "relative"])
def test_maps_of_all_settings_are_in_their_range(targets, evidence, confidence):
    model = build(targets=targets, evidence=evidence, confidence=confidence).eval()
    with torch.no_grad():
        output = model(pictures(65, 65))
    maps = heat_maps(output, model.config, model.align_corners)
    assert list(maps) == maps_of(model.config)
    for heat in maps.values():
        assert heat.dtype == torch.float32 and heat.shape == (2, 9, 9) and 0 <= heat.min() <= heat.max() <= 1


def test_maps_of_a_model_without_pooling():
    model = build(pool="none", fusion="cam").eval()
    assert list(heat_maps(model(pictures(65, 65)), model.config, True)) == maps_of(model.config)


@pytest.mark.parametrize(
    "changes, name", [({"evidence": "separate"}, "evidence"), ({"pool": "none", "fusion": "cam"}, "attention")]
)
def test_overlays_that_a_model_does_not_make_are_refused(changes, name, tmp_path):
    model = build(**changes)
    save_model(tmp_path / "run", model, info_of(TrainConfig(model=model.config)))
    (tmp_path / "picture.png").touch()
    config = PredictConfig(run=str(tmp_path / "run"), input=str(tmp_path / "picture.png"), out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=f"overlays has {name}, which .* does not make .* it has cam, refined_cam"):
        predict(replace(config, overlays=("cam", name)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("patch", [0, 32, 48])
def test_smaller_pictures_hold_whole_patches(patch):
    config = TrainConfig(
        data=DataConfig(image_size=480 if patch else 481, batch_size=1),
        model=replace(SMALL, patch=patch),
        loss=LossConfig(transform="none"),
    )
    options = [one.options for one in changes(config, lambda _: False)]
    sizes = [one["data.image_size"] for one in options if "data.image_size" in one]
    assert sizes and all(size % patch == 0 if patch else size % 32 == 1 for size in sizes)


def test_without_affinity_there_is_no_workspace_for_it():
    config = TrainConfig(data=DataConfig(image_size=97, batch_size=1), model=SMALL, loss=LossConfig(ecr=1.0))
    assert footprint(config).scratch > 0
    assert footprint(replace(config, model=replace(SMALL, refinement=("pamr",)))).scratch == 0
    assert footprint(replace(config, loss=LossConfig())).scratch == 0  # no term reads the refined CAM


def test_pamr_is_one_operator_of_a_graph():
    operator = torch.ops.ercn.pixel_adaptive_refinement.default
    cam = torch.rand(2, 2, 9, 8).to(memory_format=torch.channels_last)
    for image in (torch.rand(2, 3, 9, 8), torch.randint(0, 256, (2, 3, 9, 8), dtype=torch.uint8)):
        torch.library.opcheck(operator, (cam, image, [1, 3], 2, "pamr"))
    model = build(refinement=("affinity", "pamr")).eval()
    image = pictures(65, 65)
    program = torch.export.export(model, (image,))
    assert [node.target for node in program.graph.nodes].count(operator) == 1
    torch.testing.assert_close(program.module()(image).refined_cam, model(image).refined_cam)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image).refined_cam, model(image).refined_cam)


def test_a_split_without_masks_is_measured_without_looking_for_marks(monkeypatch):
    heat = {"cam": torch.rand(33, 33).numpy()}
    whole, quick = Localization(), Localization(marked=False)
    whole.add(heat, {}, "p", healthy=True)
    monkeypatch.setattr(froc, "peaks", None)
    quick.add(heat, {}, "p", healthy=True)
    options = {"draws": 10, "seed": 0}
    assert quick.healthy_summary({}, **options) == whole.healthy_summary({}, **options)
    assert quick.summary({}, **options) is whole.summary({}, **options) is None


def test_frozen_batchnorm_needs_a_pretraining():
    frozen = TrainConfig(run=RunConfig(freeze_batchnorm=True))
    with pytest.raises(ValueError, match="run.freeze_batchnorm keeps .* and there is none: give --init"):
        check_batchnorm(frozen)
    check_batchnorm(replace(frozen, init="runs/pretrain"))
    check_batchnorm(replace(frozen, model=replace(frozen.model, pretrained=True)))
    check_batchnorm(TrainConfig())
