"""Class weights or balanced sampling, never both."""

import numpy as np
import pytest
import torch
from _unequal import GRADES, manifest

from ercn.config import DataConfig, ModelConfig, TrainConfig, from_dict
from ercn.data import PictureDataset
from ercn.data.loading import sampling_weights
from ercn.training.fit import class_weights
from ercn.training.loaders import EpochSampler, GradedData


def config(balance):
    return TrainConfig(data=DataConfig(balance=balance), model=ModelConfig(num_grades=5))


def test_weights_make_the_grades_count_the_same_and_average_one():
    weights = class_weights(config("weights"), manifest())
    counts = torch.tensor([60.0, 25, 10, 0, 5])
    torch.testing.assert_close((weights * counts).sum() / counts.sum(), torch.tensor(1.0))
    torch.testing.assert_close(weights * counts, torch.tensor([25.0, 25, 25, 0, 25]))


def test_the_sampler_draws_the_grades_equally_often():
    records = manifest().split("train")
    weights = sampling_weights(records)
    np.testing.assert_allclose([weights[np.array(GRADES) == g].sum() for g in (0, 1, 2, 4)], 1)
    pictures = PictureDataset(records, 64, mean=(0.5,) * 3, std=(0.2,) * 3, augment=False)
    sampler = EpochSampler(pictures, seed=0, rank=0, world=1, weights=weights)
    drawn = np.zeros(5)
    for epoch in range(40):
        sampler.set_epoch(epoch)
        drawn += np.bincount([GRADES[i] for i in sampler], minlength=5)
    assert drawn.sum() == 40 * len(GRADES) and drawn[3] == 0
    expected = drawn.sum() / 4
    assert np.abs(drawn[[0, 1, 2, 4]] - expected).max() < 4 * np.sqrt(expected * 0.75)  # 4 sigma of a binomial


@pytest.mark.parametrize(("balance", "weighted", "sampled"), [("none", 0, 0), ("weights", 1, 0), ("sampler", 0, 1)])
def test_never_both(balance, weighted, sampled):
    data = GradedData(manifest(), DataConfig(balance=balance), seed=0)
    assert (class_weights(config(balance), manifest()) is not None) == weighted
    assert (data._weights(manifest().split("train")) is not None) == sampled


def test_asking_for_both_is_an_error():
    for both in (["weights", "sampler"], "weights,sampler", "both", True):
        with pytest.raises(ValueError, match="data.balance must be one of 'none', 'weights', 'sampler'; got"):
            from_dict(TrainConfig, {"data": {"balance": both}})
