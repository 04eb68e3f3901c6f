"""``make demo``: the whole method on the phantom, with the functions of the commands and the preset "demo".

Run again, it goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from ercn.config import (
    DataConfig,
    EvaluateConfig,
    PredictConfig,
    PrepareConfig,
    PretrainConfig,
    RunConfig,
    TrainConfig,
    preset,
)

PATIENTS = 300
PRETRAIN_EPOCHS = 4
PHOTOGRAPHS = 5


def configs(root: Path) -> tuple[PrepareConfig, PretrainConfig, TrainConfig, EvaluateConfig, PredictConfig]:
    """The five configurations, each under a folder of ``root``; training itself is the preset "demo"."""
    recipe = preset("demo")
    data = replace(recipe.data, root=str(root / "data"))
    run = str(root / "run")
    return (
        PrepareConfig(dataset="phantom", out=data.root, size=data.image_size, normalize="local", patients=PATIENTS),
        PretrainConfig(
            data=DataConfig(root=data.root, image_size=97, batch_size=20, workers=data.workers),
            run=RunConfig(out=str(root / "pretrain"), resume=True, epochs=PRETRAIN_EPOCHS, lr=recipe.run.lr),
            backbone=recipe.model.backbone,
            output_stride=recipe.model.output_stride,
        ),
        replace(recipe, data=data, init=str(root / "pretrain"), run=replace(recipe.run, out=run, resume=True)),
        EvaluateConfig(run=run),
        PredictConfig(run=run, input=str(root / "photographs"), out=str(root / "predictions")),
    )


def write_photographs(folder: Path, count: int) -> None:
    """Phantom photographs off-centre on a wide black frame, as a camera makes them, of patients not in the data."""
    import numpy as np
    from PIL import Image

    from ercn.data import render_phantom

    folder.mkdir(parents=True, exist_ok=True)
    for patient in range(count):
        disc, _ = render_phantom(patient, "left", patient % 5, 512, seed=1)
        frame = np.zeros((540, 720, 3), np.uint8)
        frame[14:526, 60 + 20 * patient : 572 + 20 * patient] = disc
        Image.fromarray(frame).save(folder / f"photograph_{patient}_grade_{patient % 5}.jpg", quality=95)


def main(root: Path = Path("runs/demo")) -> None:
    """Prepares, pre-trains, trains, evaluates and predicts, and prints the time of each."""
    from ercn.data import prepare
    from ercn.training import evaluate, predict, pretrain, train

    prepared, pretrained, trained, evaluated, predicted = configs(root)
    write_photographs(Path(predicted.input), PHOTOGRAPHS)
    shutil.rmtree(predicted.out, ignore_errors=True)  # of an earlier demo; predict never overwrites
    seconds = {}
    for function, config in (
        (prepare, prepared),
        (pretrain, pretrained),
        (train, trained),
        (evaluate, evaluated),
        (predict, predicted),
    ):
        print(f"\n== ercn {function.__name__}", flush=True)
        start = time.perf_counter()
        function(config)
        seconds[function.__name__] = round(time.perf_counter() - start, 1)
    (root / "seconds.json").write_text(json.dumps(seconds))
    print(f"\n{sum(seconds.values()):.0f} s: {', '.join(f'{name} {s:.0f}' for name, s in seconds.items())}")
    print(f"report: {root / 'run' / 'report.html'}   overlays: {Path(predicted.out) / 'overlays'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
