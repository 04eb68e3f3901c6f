"""Large pictures: recomputed blocks that change no bit, maps of any aspect ratio, a plan of the memory."""

import copy
from dataclasses import replace

import _ranks
import _steps
import pytest
import torch

from ercn import cli
from ercn.config import DataConfig, LossConfig, ModelConfig, PlanConfig, PretrainConfig, RunConfig, TrainConfig
from ercn.grad_checkpointing import checkpoint_blocks
from ercn.models import ERCN, create_backbone, stages
from ercn.objective import ercn_loss
from ercn.ops import use_backend
from ercn.training import planning, run_folder, steps
from ercn.training.module import ERCNModule
from ercn.training.planning import changes, footprint
from ercn.training.pretraining import Contrastive
from ercn.transforms import sample_transform

SMALL = ModelConfig(backbone="test_resnet", output_stride=8, embed_dim=8, pool_dim=8, refinement=("affinity",))
WHOLE = LossConfig(ecr=1.0, consistency=0.1)


def step(backbone, run):
    """Features, gradients and all statistics after a training step on a picture that is not square."""
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    maps = run(backbone, image)
    sum(x.sin().mean() for x in maps).backward()
    return [*maps, *(p.grad for p in backbone.parameters()), *backbone.state_dict().values()]


@pytest.mark.parametrize("name, stride, blocks", [
    ("resnet18", 8, 8), ("mobilenetv3_small_050", 32, 12), ("test_convnext", 32, 9),
])  # fmt: skip
def test_recomputed_blocks_change_no_bit(name, stride, blocks):
    torch.manual_seed(0)
    plain = create_backbone(name, stride).train()
    saving, keys = copy.deepcopy(plain), list(plain.state_dict())
    assert checkpoint_blocks(saving) == blocks and list(saving.state_dict()) == keys
    twin = copy.deepcopy(saving)  # as MoCo's momentum copy and the average of weights are made
    expected = step(plain, stages)
    for backbone in (saving, twin):
        assert all(torch.equal(a, b) for a, b in zip(step(backbone, stages), expected, strict=True))


def test_recomputed_blocks_compile_without_graph_breaks():
    torch.compiler.reset()
    torch.manual_seed(0)
    plain = create_backbone("test_resnet", 16).train()
    saving = copy.deepcopy(plain)
    checkpoint_blocks(saving)
    compiled = torch.compile(stages, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(saving, compiled), step(plain, stages), strict=True):
        torch.testing.assert_close(a, b)


def test_a_backbone_without_blocks_is_refused():
    with pytest.raises(ValueError, match="run.grad_checkpointing: Sequential has no blocks"):
        checkpoint_blocks(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU()))


@pytest.mark.parametrize("kind", ["rescale", "rot90", "affine"])
@pytest.mark.parametrize("size", [(8, 512), (256, 24)])
def test_maps_of_any_aspect_ratio(kind, size):
    """Loss and gradients of the cpu backend equal the reference's, down to maps of two rows."""
    torch.manual_seed(0)
    model = ERCN(SMALL).double()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    transform = sample_transform(kind, torch.Generator().manual_seed(0), size=size, align_corners=model.align_corners)
    losses = replace(WHOLE, min_pool=1.0)
    found = []
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            total, _ = ercn_loss(model, image, torch.tensor([1, 4]), SMALL, losses, transform)
            gradients = torch.autograd.grad(total, list(model.parameters()))
        found.append([total.detach(), *gradients])
        assert model(image).cam.shape[2:] == (size[0] // 8 + 1, size[1] // 8 + 1)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_settings_of_a_run_reach_the_network():
    config = TrainConfig(model=SMALL, run=RunConfig(grad_checkpointing=True, compile=True, accelerator="cpu"))
    module = ERCNModule(ERCN(SMALL), config)
    keys = list(module.state_dict())
    steps.set_up(module, module.model, config.run)
    assert module.model._compiled_call_impl is not None and list(module.state_dict()) == keys
    with pytest.raises(ValueError, match="no blocks|run.grad_checkpointing"):
        checkpoint_blocks(torch.nn.ReLU())
    pretraining = PretrainConfig(backbone="test_resnet", run=RunConfig(sync_batchnorm=True, accelerator="cpu"))
    contrastive = Contrastive(pretraining, 4)
    with pytest.raises(ValueError, match="run.sync_batchnorm needs GPUs"):
        steps.set_up(contrastive, contrastive.online, pretraining.run)


BASE = TrainConfig(
    data=DataConfig(image_size=224, batch_size=2),
    model=ModelConfig(backbone="resnet18", output_stride=8, refinement=("affinity",)),
    loss=WHOLE,
)


# A factor of 1.1: oneDNN's and the operators' own workspaces and the libraries' small blocks are not predicted.
@pytest.mark.parametrize("run", [{}, {"grad_checkpointing": True}, {"precision": "bf16-mixed"}], ids=str)
def test_predicted_memory_is_what_training_steps_take(run, tmp_path):
    config = replace(BASE, run=replace(BASE.run, **run))
    assert _ranks.run(1, _steps.save_peak, config, str(tmp_path / "peak")) == [0]
    measured, predicted = int((tmp_path / "peak").read_text()), footprint(config).peak
    assert predicted / 1.1 < measured < predicted * 1.1, measured / predicted


def test_the_parts_of_the_plan():
    def part(name, **run):
        return vars(footprint(replace(BASE, run=replace(BASE.run, **run))))[name]

    with torch.device("meta"):
        parameters = sum(p.nbytes for p in ERCN(BASE.model).parameters())
    assert part("gradients") == parameters and part("optimizer") == 2 * parameters
    assert part("average") == 0 and part("average", ema=0.9) == part("weights") > parameters
    assert part("buckets") == 0 and part("buckets", devices=2) == parameters
    assert part("weights", precision="bf16-true") < 0.51 * part("weights")
    with pytest.raises(ValueError, match="run.precision must be one of 32-true, .*; got 'int8'"):
        part("weights", precision="int8")


LARGE = replace(BASE, data=replace(BASE.data, image_size=1024, batch_size=4))


def test_what_to_change_ends_with_what_fits():
    first, second = changes(LARGE, lambda one: one.peak < 2.2e9)
    assert first.options == {"run.grad_checkpointing": True}
    assert second.options == {"data.batch_size": 2, "run.accumulate": 2} and second.config.run.grad_checkpointing
    assert footprint(second.config) == second.footprint
    assert footprint(LARGE).peak > first.footprint.peak > 2.2e9 > second.footprint.peak


def test_the_command_tells_what_fits(capsys):
    options = ["--model.backbone", "test_resnet", "--data.image_size", "513", "--data.batch_size", "2"]
    assert cli._run("plan", [*options, "--memory", "1"]) == 0
    printed = capsys.readouterr().out
    assert "fits into 1.00 GB, of which 90% are planned with" in printed and "optimizer" in printed
    assert cli._run("plan", ["--preset", "demo", *options, "--memory", "0.1"]) == 1
    printed = capsys.readouterr().out
    assert "does not fit into 0.10 GB" in printed
    assert "fits          with --run.precision bf16-mixed" in printed


class Trainer:
    current_epoch, is_global_zero, interrupted = 2, True, False

    def __init__(self, error):
        self.error = error

    def fit(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes."),
    MemoryError("std::bad_alloc"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_a_run_without_memory_ends_with_advice(error):
    with pytest.raises(MemoryError, match="out of memory in epoch 3: take less") as raised:
        run_folder.fit(Trainer(error), None, None, None, lambda: "take less")
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("failed", [MemoryError(), KeyError("x"), RuntimeError("a\n  sentence")], ids=repr)
def test_advice_that_fails_hides_no_error(failed):
    """The user must see the error about the memory."""

    def advice():
        raise failed

    error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(MemoryError) as raised:
        run_folder.fit(Trainer(error), None, None, None, advice)
    said = {"MemoryError": "", "KeyError": ": 'x'", "RuntimeError": ": a sentence"}[type(failed).__name__]
    assert str(raised.value) == (
        f"out of memory in epoch 3: what would fit could not be predicted ({type(failed).__name__}{said})"
    )
    assert raised.value.__cause__ is error


def test_advice_for_a_run_without_memory(monkeypatch):
    monkeypatch.setattr(planning, "available", lambda config: 2.2e9 / 0.9)
    advice = planning.advice(LARGE)
    assert "GB by prediction, and 2.44 GB are there; " in advice
    assert advice.endswith("GB with --run.grad_checkpointing true --data.batch_size 2 --run.accumulate 2")
    monkeypatch.setattr(planning, "available", lambda config: 80e9)
    assert "something else takes it or limits it" in planning.advice(LARGE)
    monkeypatch.setattr(planning, "available", lambda config: 1e6)
    monkeypatch.setattr(planning, "changes", lambda config, fits: [])
    assert "take a smaller model.backbone or a larger device" in planning.advice(LARGE)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shape"):
        run_folder.fit(Trainer(RuntimeError("shape '[2]' is invalid")), None, None, None, lambda: "take less")


def test_the_plan_needs_no_data_and_keeps_the_state_of_torch():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    footprint(replace(BASE, model=SMALL))
    assert torch.equal(torch.get_rng_state(), before) and torch.get_default_dtype() == torch.float32
    assert PlanConfig().memory is None
