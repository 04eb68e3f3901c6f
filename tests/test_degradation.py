"""The map that floods while the loss falls: so with the consistency loss as published, not by default."""

from dataclasses import replace

import torch
from _ops import generator

from ercn.config import preset
from ercn.data import render_phantom
from ercn.models import ERCN
from ercn.objective import ercn_loss
from ercn.training.maps import extent
from ercn.transforms import sample_transform


def trained(model, loss, steps=24):
    """How much the CAMs of disease cover after steps on ten pictures, and the loss before and after."""
    recipe = preset("demo")
    model, loss = replace(recipe.model, **model), replace(recipe.loss, **loss)
    drawn = [render_phantom(patient, "left", patient % 5, 97, seed=1, difficulty="easy")[0] for patient in range(10)]
    image = torch.stack([torch.from_numpy(picture.copy()).permute(2, 0, 1) / 255 for picture in drawn])
    image = (image - image.mean((0, 2, 3), keepdim=True)) / image.std((0, 2, 3), keepdim=True)
    grade = torch.arange(10) % 5
    torch.manual_seed(1)
    network = ERCN(model)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    totals = []
    for step in range(steps):
        transform = sample_transform(
            loss.transform, generator(step), rescale=loss.rescale, size=97, align_corners=network.align_corners
        )
        total, _ = ercn_loss(network, image, grade, model, loss, transform)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        totals.append(total.item())
    with torch.no_grad():
        cam = network(image, refine=False).cam
    return extent(cam, model)[grade > 0].mean().item(), totals[0], totals[-1]


def test_as_published_the_map_floods_while_the_loss_falls():
    covered, before, after = trained(
        {"refinement": ("affinity",), "confidence": "relative", "center": False, "detach": False},
        {
            "er": 0.0,
            "transform": "none",
            "consistency": 1.0,
            "detach_refined": False,
            "consistency_eps": 1e-10,
            "scale_refined": True,
        },
    )
    assert after < before / 4 and covered > 0.6


def test_by_default_it_does_not():
    covered, before, after = trained({}, {})
    assert after < before / 2 and covered < 0.4
