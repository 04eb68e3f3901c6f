"""Training and validation steps: frozen BatchNorm, and what validation logs of the CAMs."""

from dataclasses import replace
from types import SimpleNamespace

import _steps
import pytest
import torch
from torch import nn

from ercn.models import ERCN, ERCNOutput
from ercn.training.module import ERCNModule


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_batchnorm_keeps_statistics_and_weights(freeze):
    """Calls come in Lightning's order: optimizers first, then ``train()``, again after each validation."""
    config = _steps.module_of("train").config
    config = replace(config, run=replace(config.run, freeze_batchnorm=freeze, warmup_epochs=0))
    torch.manual_seed(0)
    module = ERCNModule(ERCN(config.model), config)
    module.trainer = SimpleNamespace(world_size=1, global_rank=0, current_epoch=3, estimated_stepping_batches=4)
    module.log = lambda *_, **__: None
    optimizer = module.configure_optimizers()["optimizer"]
    norms = {name for name, layer in module.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for step, batch in enumerate(_steps.batches("train")):
        module.eval()
        module.train()
        loss = module.training_step({"image": batch["image"].float(), "grade": batch["grade"]}, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert module.training and module.model.pool.training
    moved = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    of_norms = {key for key in before if key.rpartition(".")[0] in norms}
    weights = {key for key in before if key.endswith(".weight")}
    assert len(norms) > 5 and weights - of_norms <= moved
    if freeze:
        assert not moved & of_norms
    else:
        assert of_norms <= moved


@pytest.mark.parametrize(
    "grades, dead, extent",
    [([0, 1, 2, 4], 2 / 3, (1 + 0 + 1 / 36) / 3), ([0, 0, 3, 3], 0.5, 1 / 72), ([0, 0, 0, 0], 0.0, 0.0)],
)
def test_validation_logs_the_cams_of_pictures_with_disease(grades, dead, extent):
    """Four pictures in batches of two: the first three have a flat CAM, of which the second is positive."""
    config = _steps.module_of("train").config
    cam = torch.full((4, 4, 6, 6), -1.0)
    cam[1], cam[3, 2, 1, 4] = 0.5, 2.0
    logits = torch.zeros(2, 4)

    class Known(nn.Module):
        def forward(self, image, *, refine=True):
            assert not refine and len(image) == 2
            part = cam[int(image[0, 0, 0, 0]) :][:2]
            return ERCNOutput(logits, logits, None, part, part, part, None)

    module = ERCNModule(Known(), replace(config, model=replace(config.model, cam_pool="relu")))
    module.trainer = SimpleNamespace(world_size=1, global_rank=0)
    logged = {}
    module.log_dict = lambda values, **_: logged.update(values)
    image = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    for first in (0, 2):
        batch = {"image": image[first : first + 2], "grade": torch.tensor(grades[first : first + 2])}
        module.validation_step(batch, first)
    module.on_validation_epoch_end()
    assert logged["val_flat_cam"] == pytest.approx(dead) and logged["val_cam_extent"] == pytest.approx(extent)
    assert {"val_accuracy", "val_kappa", "val_loss"} < logged.keys() and module.validated == []
