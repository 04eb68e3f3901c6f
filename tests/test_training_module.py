"""What a training step changes, as the run's settings have it."""

from dataclasses import replace
from types import SimpleNamespace

import _steps
import pytest
import torch
from torch import nn

from ercn.models import ERCN
from ercn.training.module import ERCNModule


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_batchnorm_keeps_statistics_and_weights(freeze):
    """As Lightning does: optimizers are made first, then the module is told to train, and again after validation."""
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
