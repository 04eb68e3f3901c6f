"""The GPU backends on inputs with exact results: all outputs and gradients are bit-equal.

On a GPU at sizes of use; interpreted and emulated (see test_gpu_ops.py) at the edges of tiles.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from _exact import BAGS, check_affinity, check_pool
from _gpu_backends import BACKENDS, DEVICE

from ercn.ops import triton, use_backend

if not BACKENDS:
    pytest.skip("no GPU backend can be used in this process", allow_module_level=True)

GPU = DEVICE == "cuda"
pytestmark = [pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"), *([pytest.mark.gpu] if GPU else [])]

HOPPER = "cuda" in BACKENDS and (not GPU or torch.cuda.get_device_capability() == (9, 0))
VARIANTS = [*(["triton"] if "triton" in BACKENDS else []), *(["cuda generic"] if "cuda" in BACKENDS else [])]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
# 64 to 256 channels have special kernels or tile tables; 100 and 300 use the general ones.
AFFINITY = list(itertools.product([64, 100, 128, 192, 256, 300], DTYPES, [131]))
TF32 = [64, 128, 192, 256]
POOL = list(itertools.product(BAGS, DTYPES))
if triton.INTERPRETED:  # all would take minutes
    AFFINITY = list(zip([192, 64, 300], DTYPES, [67, 131, 67]))
    TF32 = TF32[:1]
    POOL = [("ragged", torch.float16), ("both", torch.bfloat16)]


@pytest.fixture(params=VARIANTS)
def backend(request, monkeypatch):
    name, _, kernels = request.param.partition(" ")
    monkeypatch.setenv("ERCN_CUDA_KERNELS", kernels)
    with use_backend(name):
        yield name


@pytest.mark.parametrize("dim, dtype, n", AFFINITY, ids=str)
def test_affinity(backend, dim, dtype, n):
    check_affinity(backend, 1, 22, dim, n, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dim", TF32)
def test_affinity_in_tf32(backend, dim, tf32):
    check_affinity(backend, 1, 22, dim, 67, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_affinity_of_half_precision_maps_and_blocks_of_channels(backend, dtype):
    check_affinity(backend, 2, 70, 64, 35, dtype=dtype, value_dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("kind, dtype", POOL, ids=str)
def test_pool(backend, kind, dtype):
    sizes = dict(dtype=dtype, device=DEVICE, **BAGS[kind])
    check_pool(backend, dim=72, hidden=40, heads=3, **sizes)
    check_pool(backend, dim=33, hidden=17, heads=1, gated=False, bias=False, attention="uniform", **sizes)


def test_pool_in_tf32(backend, tf32):
    check_pool(backend, [0, 65], 72, 40, 3, dtype=torch.float32, device=DEVICE)
    check_pool(backend, 68, 72, 40, 3, dtype=torch.float32, device=DEVICE, layout="channels_first")


if not triton.INTERPRETED:

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_pool_of_many_instances(backend, dtype):
        """More segments of 64 instances than one thread adds."""
        check_pool(backend, 33 * 64 + 1, 8, 8, 1, dtype=dtype, device=DEVICE)


if HOPPER:
    forward_kernels = pytest.mark.parametrize("backend", ["cuda sm90", "cuda sm90_dense"], indirect=True)

    @forward_kernels
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("channels", [7, 22, 30])
    @pytest.mark.parametrize("dim", [64, 128, 192, 256])
    def test_affinity_of_hopper(backend, dim, channels, dtype):
        check_affinity(backend, 1, channels, dim, 259, dtype=dtype, device=DEVICE)

    @forward_kernels
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_affinity_of_hopper_with_blocks_of_channels(backend, dtype):
        check_affinity(backend, 2, 70, 64, 131, dtype=dtype, value_dtype=dtype, device=DEVICE)

    @pytest.mark.parametrize("backend", ["cuda sm90"], indirect=True)
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("kind", BAGS)
    def test_pool_of_hopper(backend, kind, dtype):
        sizes = dict(dtype=dtype, device=DEVICE, **BAGS[kind])
        check_pool(backend, dim=128, hidden=192, heads=3, **sizes)
        check_pool(backend, dim=320, hidden=64, heads=1, bias=False, attention="uniform", **sizes)


if GPU:
    everywhere = pytest.mark.parametrize(
        "backend", [*VARIANTS, *(["cuda sm90", "cuda sm90_dense"] if HOPPER else [])], indirect=True
    )

    @everywhere
    @pytest.mark.parametrize("n", [56**2, 96**2, 128**2, 128**2 + 3])
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("dim", [64, 192])
    def test_affinity_at_sizes_of_use(backend, dim, dtype, n):
        check_affinity(backend, 1, 22, dim, n, dtype=dtype, device=DEVICE)

    @pytest.mark.parametrize("n", [96**2, 128**2 + 3])
    def test_affinity_of_float32_at_sizes_of_use(backend, n):
        check_affinity(backend, 1, 22, 64, n, dtype=torch.float32, device=DEVICE)

    @everywhere
    def test_affinity_of_65536_pixels(backend):
        check_affinity(backend, 1, 22, 192, 256**2, dtype=torch.bfloat16, device=DEVICE)

    everywhere = pytest.mark.parametrize("backend", [*VARIANTS, *(["cuda sm90"] if HOPPER else [])], indirect=True)

    @everywhere
    @pytest.mark.parametrize("attention", ["one_hot", "uniform"])
    @pytest.mark.parametrize("layout", ["rows", "channels_first"])
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_pool_of_65536_instances(backend, dtype, layout, attention):
        check_pool(backend, 256**2, 512, 256, 1, dtype, device=DEVICE, layout=layout, attention=attention)

    @everywhere
    def test_pool_of_ragged_bags_at_sizes_of_use(backend):
        check_pool(backend, [128**2 + 3, 1, 56**2, 0, 96**2], 1024, 256, 4, torch.bfloat16, device=DEVICE)
