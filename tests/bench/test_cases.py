"""The registry of cases: what it holds, and its arithmetic against torch's own counters."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ercn.benchmarks import cases, network
from ercn.benchmarks.cases import AffinityCase, ModelCase, PoolCase, RefinementCase, WalkCase
from ercn.benchmarks.variants import inputs_of, variants


def ids(op, device):
    return [case.id for case in cases.registry(op, device)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ids_are_unique_and_the_shapes_that_occur_are_there(device):
    every = [i for op in cases.OPS for i in ids(op, device)]
    assert len(every) == len(set(every))
    for batch in (1, 8):
        for channels in (6, 22):
            for dim in (64, 128, 192, 256):
                for side in (28, 56, 96, 128, 256):
                    for direction in cases.DIRECTIONS:
                        assert f"affinity/{direction}/float32/b{batch}-c{channels}-d{dim}-{side}x{side}" in every
    for instances in (49, 65536):
        for dim in (512, 1024, 2048):
            for hidden in (128, 256, 512):
                for heads in (1, 4):
                    assert f"mil/backward/bfloat16/dense-n{instances}-d{dim}-l{hidden}-k{heads}" in every
    assert any("/map-" in i for i in every) and any("/ragged-b64-" in i for i in every)
    for size in (512, 1024, 2048):
        for direction in ("forward", "forward_backward"):
            assert f"model/{direction}/bfloat16/resnet50-b1-{size}px" in every


def test_tf32_and_float16_are_for_gpus():
    assert not any("/tf32/" in i or "/float16/" in i for i in ids("affinity", "cpu"))
    assert any("/tf32/" in i for i in ids("mil", "cuda"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_standard_pattern_selects_something(device):
    every = [i for op in cases.OPS for i in ids(op, device)]
    for pattern in cases._STANDARD[device] + cases._QUICK:
        assert any(cases.re.fullmatch(pattern, i) for i in every), pattern


SMALL = [
    AffinityCase(2, 5, 24, 8, direction=direction, dtype=dtype)
    for direction in cases.DIRECTIONS
    for dtype in ("float32", "bfloat16")
]
SMALL += [
    PoolCase(392, 128, 32, heads=2, layout=layout, bags=4 if layout == "ragged" else 1, direction=direction)
    for layout in ("dense", "ragged")
    for direction in cases.DIRECTIONS
]
SMALL += [PoolCase(49, 64, 32, layout="map", direction="forward_backward")]
SMALL += [case(*sizes, direction=direction) for case, sizes in ((RefinementCase, (2, 3, 8)), (WalkCase, (3, 9)))
          for direction in ("forward", "forward_backward")]  # fmt: skip


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_inputs_are_random_repeatable_and_of_the_stated_shape(case):
    one, two = case.inputs("cpu"), case.inputs("cpu")
    for a, b in zip((*one.tensors, one.upstream), (*two.tensors, two.upstream)):
        assert torch.equal(a, b)
    for x in one.leaves:
        assert x.dtype == cases.DTYPES[case.dtype]
        assert x.numel() == 1 or x.unique().numel() > 1
    if case.op == "affinity":
        assert [list(x.shape) for x in one.tensors] == [[2, 5, 64], [2, 24, 64]]
        products = case.inputs("cpu", kink_safe=True).tensors[1].double() * 32
        assert torch.equal(products, products.round()) and products.abs().max() == 3


def test_ragged_bags_are_within_the_stated_lengths():
    case = next(c for c in cases.registry("mil", "cpu") if c.layout == "ragged" and c.bags == 64)
    lengths = case.lengths()
    assert len(lengths) == 64 and min(lengths) >= 49 and max(lengths) <= 4096 and len(set(lengths)) > 32
    assert abs(sum(lengths) - case.instances) < 0.05 * case.instances


def test_a_map_is_a_view_of_channels_first_memory():
    h = PoolCase(49, 64, 32, layout="map").inputs("cpu").tensors[0]
    assert h.shape == (1, 49, 64) and h.mT.is_contiguous()


# Forward FLOPs of ours equal torch's count of our operator; eager's, of plain torch.
@pytest.mark.parametrize("case", [c for c in SMALL if c.dtype == "float32"], ids=lambda case: case.id)
@pytest.mark.parametrize("name", ["eager", "ercn-reference"])
def test_flops_agree_with_torchs_counter(case, name):
    variant = next(v for v in variants(case, "cpu") if v.name == name)
    run = variant.make(case, case.inputs("cpu"))
    if name == "ercn-reference" and case.direction != "forward":
        # The registered formula of the backward counts G·A on C rows where the case counts the maps only.
        tolerance = 0.05
    else:
        tolerance = 0.02
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == pytest.approx(variant.flops(case), rel=tolerance)


@pytest.mark.parametrize("case", SMALL[-4:], ids=lambda case: case.id)
def test_refinements_agree_with_their_published_forms(case):
    data = case.inputs("cpu")
    data = cases.Inputs((data.tensors[0].double(), data.tensors[1]), data.upstream.double())
    found = {v.name: v.make(case, data)() for v in variants(case, "cpu") if v.name in ("eager", "ercn-reference")}
    for ours, theirs in zip(found["ercn-reference"], found["eager"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_flops_and_bytes_by_hand():
    case = AffinityCase(1, 21, 192, 56)
    assert case.flops() == 2 * 3136**2 * (192 + 22)
    assert case.min_bytes() == 4 * 3136 * (21 + 192 + 21)
    unit = 2 * 3136**2 * 192
    backward = AffinityCase(1, 21, 192, 56, direction="backward").flops() / unit
    assert backward == pytest.approx(2 + (3 * 21 + 2) / 192)
    assert RefinementCase(1, 21, 256).flops() == 2 * 10 * 48 * 21 * 65536
    assert WalkCase(21, 56).flops() == 2 * 256 * 69 * 21 * 3136
    eager = next(v for v in variants(WalkCase(21, 56), "cpu") if v.name == "eager")
    assert eager.flops(WalkCase(21, 56)) == 2 * (8 * 3136**3 + 21 * 3136**2)
    pool = PoolCase(1024, 512, 256)
    assert pool.flops() == 4 * 1024 * 512 * 256 + 2 * 1024 * (256 + 512)


def triangle(cam, feat, grad_out, tile=4):
    """The linear operator and its gradients from the tiles i <= j alone: what a backend with a triangle executes."""
    value = torch.cat([cam, torch.ones_like(cam[:1])])
    grad = torch.cat([grad_out, torch.zeros_like(grad_out[:1])])
    out, grad_value, grad_feat = torch.zeros_like(value), torch.zeros_like(value), torch.zeros_like(feat)
    columns = feat.shape[1]

    def forward():
        for i in range(0, columns, tile):
            for j in range(i, columns, tile):
                rows, cols = slice(i, i + tile), slice(j, j + tile)
                aff = torch.relu(feat[:, rows].T @ feat[:, cols])
                out[:, cols] += value[:, rows] @ aff
                if i != j:
                    out[:, rows] += value[:, cols] @ aff.T

    def backward():
        for i in range(0, columns, tile):
            for j in range(i, columns, tile):
                rows, cols = slice(i, i + tile), slice(j, j + tile)
                aff = torch.relu(feat[:, rows].T @ feat[:, cols])
                left, right = torch.cat([value, grad]), torch.cat([grad, value])
                weight = (left[:, rows].T @ right[:, cols]) * (aff > 0)
                for target, source, product in ((grad_value, grad, aff), (grad_feat, feat, weight)):
                    target[:, cols] += source[:, rows] @ product
                    if i != j:
                        target[:, rows] += source[:, cols] @ product.T

    return {"forward": forward, "backward": backward}, out, grad_value, grad_feat


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
def test_a_backend_that_uses_the_symmetry_executes_what_a_triangle_of_tiles_does(direction):
    case = AffinityCase(1, 5, 24, 16, direction=direction)
    inputs = case.inputs("cpu", kink_safe=True)
    cam, feat = (x[0].double() for x in inputs.tensors)
    upstream = inputs.upstream[0].double()
    passes, out, grad_value, grad_feat = triangle(cam, feat, upstream)
    with FlopCounterMode(display=False) as counter:
        for name in direction.split("_"):
            passes[name]()
    executed = next(v for v in variants(case, "cpu") if v.name == "ercn-cpu").flops(case)
    # Tiles of 4 on the diagonal of 256 pixels: at most 1 / 64 more.
    assert executed <= counter.get_total_flops() <= executed * (1 + 1 / 64)
    assert executed < 0.8 * case.flops()
    value = torch.cat([cam, torch.ones_like(cam[:1])])
    leaves = [value.requires_grad_(), feat.requires_grad_()]
    expected = leaves[0] @ torch.relu(leaves[1].T @ leaves[1])
    grads = torch.autograd.grad(expected, leaves, torch.cat([upstream, torch.zeros_like(upstream[:1])]))
    if "forward" in direction:
        torch.testing.assert_close(out, expected)
    if "backward" in direction:
        torch.testing.assert_close((grad_value, grad_feat), grads)


def test_executed_flops_by_hand():
    case = AffinityCase(1, 5, 192, 56)
    unit = 2 * 3136**2
    by_name = {v.name: v for v in variants(case, "cpu")}
    backward = AffinityCase(1, 5, 192, 56, direction="backward")
    assert by_name["ercn-cpu"].flops(case) == unit * (96 + 6)
    assert by_name["ercn-cpu"].flops(backward) == unit * (96 + 6 + 192 + 6)
    assert by_name["ercn-reference"].flops(case) == case.flops() == unit * (192 + 6)


def test_the_networks_flops_are_counted_without_running_it():
    small = ModelCase(64, backbone="resnet18")
    step = ModelCase(64, backbone="resnet18", direction="forward_backward")
    inference, training = network.flops(small), network.flops(step)
    assert 0 < 2 * inference < training
    assert network.min_bytes(step) > network.min_bytes(small) > 4 * 3 * 64 * 64
    with FlopCounterMode(display=False) as counter:
        network.runner(small, inputs_of(small, "cpu"), "reference")()
    assert counter.get_total_flops() == pytest.approx(inference, rel=0.01)
