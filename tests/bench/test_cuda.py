"""The bench's account of launched CUDA kernels, with a stand-in for the compiled module."""

from __future__ import annotations

import pytest

from ercn.benchmarks import kernels
from ercn.benchmarks.cases import AffinityCase, ModelCase, PoolCase
from ercn.benchmarks.variants import inputs_of, variants
from ercn.ops import _backends, _extension, reference


@pytest.fixture
def records(monkeypatch):
    forward = {
        "name": "ercn::affinity::Forward<ercn::affinity::BFloat16>", "launches": 2, "threads": 128, "registers": 234,
        "local_bytes": 0, "static_shared_bytes": 0, "dynamic_shared_bytes": 90112, "blocks_per_multiprocessor": 2,
    }  # fmt: skip
    table = [forward, forward | {"name": "ercn::pool::Combine", "launches": 5}]
    monkeypatch.setattr(_extension, "cuda_kernels", lambda attributes=False: table)
    monkeypatch.setattr(kernels.cuda, "unavailable", lambda: None)
    return table


def test_only_what_was_launched_is_reported(records):
    with kernels.launched() as found:
        records[0]["launches"] += 3
    assert [(k["name"], k["launches"]) for k in found] == [(records[0]["name"], 3)]
    (sentence,) = kernels.described([{"kernels": found}, {"kernels": found}, {}])
    assert sentence == (
        "affinity::Forward<ercn::affinity::BFloat16>: 234 registers, 0 bytes local, 90,112 bytes shared, 128 threads, "
        "2 blocks a multiprocessor"
    )


def test_kernels_are_known_by_name(records, monkeypatch):
    """The attributes leave out a kernel without code for the device, or say that it is absent."""
    absent = {key: records[0][key] for key in ("name", "launches", "threads")} | {"absent": "invalid device function"}
    for attributes in (records[1:], [absent, records[1]], records[::-1]):
        reported = [records, attributes]
        monkeypatch.setattr(_extension, "cuda_kernels", lambda attributes=False, rows=reported: rows[attributes])
        with kernels.launched() as found:
            records[1]["launches"] += 1
        assert [(k["name"], k["launches"]) for k in found] == [(records[1]["name"], 1)]


def test_a_device_that_tells_no_attributes_costs_no_row(records, monkeypatch):
    def reported(attributes=False):
        if attributes:
            raise RuntimeError("invalid device function")
        return records

    monkeypatch.setattr(_extension, "cuda_kernels", reported)
    with kernels.launched() as found:
        records[1]["launches"] += 4
    assert [(k["name"], k["launches"]) for k in found] == [("ercn::pool::Combine", 4)]
    assert kernels.described([{"kernels": found}]) == ["pool::Combine: invalid device function"]


@pytest.mark.parametrize(
    "case",
    [
        AffinityCase(2, 3, 24, 5, dtype="bfloat16"),
        PoolCase(64, 24, 16, heads=2, dtype="bfloat16"),
        PoolCase(98, 24, 16, layout="ragged", bags=2),
        ModelCase(64, backbone="resnet18"),
    ],
    ids=lambda case: case.id,
)
def test_a_backend_is_asked_about_what_it_is_given(monkeypatch, case):
    """The op's own arguments in its order: the width that the CUDA backend looks at is that of feat."""
    if isinstance(case, ModelCase):
        pytest.importorskip("timm")
    asked, given = {}, {}

    class Launcher:
        unavailable = staticmethod(lambda: None)

        @staticmethod
        def can_run(op, *args):
            asked.setdefault(op, args)

        def __getattr__(self, op):
            return lambda *args: given.setdefault(op, args) and getattr(reference, op)(*args)

    row = _backends.Backend("recorder", "cpu", Launcher(), automatic=False)
    monkeypatch.setattr(_backends, "TABLE", (*_backends.TABLE, row))
    variant = next(v for v in variants(case, "cpu") if v.name == "ercn-recorder")
    inputs = inputs_of(case, "cpu")
    assert variant.obstacle(case, inputs) is None
    before = dict(asked)
    variant.make(case, inputs)()
    assert before.keys() == given.keys()
    for op, args in given.items():
        assert [x is None for x in args] == [x is None for x in before[op]]
        feat, expected = (x[1 if op == "relu_affinity" else 0] for x in (before[op], args))
        assert (feat.dtype, feat.dim()) == (expected.dtype, expected.dim())
        assert op != "relu_affinity" or feat.shape[1] == expected.shape[1]


def test_nothing_is_reported_without_the_backend(monkeypatch):
    monkeypatch.setattr(kernels.cuda, "unavailable", lambda: "torch finds no GPU, or no driver for it")
    with kernels.launched() as found:
        pass
    assert found == [] and kernels.described([{"kernels": found}]) == []
