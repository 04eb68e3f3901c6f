"""A run folder as training leaves it, of a network that was never trained: evaluation and reports ask for no more."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from ercn._environment import environment
from ercn._files import write_csv, write_json
from ercn.checkpoint import save_model
from ercn.config import DataConfig, EvaluateConfig, ModelConfig, RunConfig, TrainConfig
from ercn.data import Manifest
from ercn.evaluation.collecting import collect
from ercn.evaluation.evaluating import choose_on_validation, write_evaluation
from ercn.evaluation.filters import FILTERS
from ercn.models import ERCN
from ercn.training.fit import describe

SETTINGS = EvaluateConfig(batch_size=8, workers=0, accelerator="cpu", progress=False)


def write_run(out: Path, root: Path, seed: int = 0, draws: int = 20, **model) -> Path:
    """export/, config.yaml, environment.json, metrics.csv and evaluation/val.json of a random network at 64 px."""
    manifest = Manifest.load(root)
    config = TrainConfig(
        data=DataConfig(root=str(root), image_size=64, workers=0),
        model=replace(
            ModelConfig(backbone="mobilenetv3_small_050", embed_dim=8, num_grades=len(manifest.class_names)), **model
        ),
        run=RunConfig(out=str(out), seed=seed),
    )
    torch.manual_seed(seed)
    network = ERCN(config.model)
    info = replace(describe(config, manifest), normalize="none", epoch=2, parameters=1)
    collected = collect(network, info, manifest.split("val"), SETTINGS, filters=FILTERS)
    info = choose_on_validation(info, collected, manifest)
    save_model(out, network, info)
    plain = json.loads(json.dumps(asdict(config)))  # lists for tuples
    (out / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    write_json(out / "environment.json", environment())
    history = [{"epoch": e, "loss": 1 / e, "val_loss": 1 / e, "val_kappa": e / 9} for e in (1, 2, 3)]
    write_csv(out / "metrics.csv", history)
    chosen = {"map_thresholds": info.thresholds, "chosen_on": f"val of {manifest.dataset}"}
    write_evaluation(out, "val", collected, info, manifest, **chosen, draws=draws, seed=0)
    return out
