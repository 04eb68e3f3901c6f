"""Device functions of every kernel: rounding, products of a given precision, long sums, factors in two terms."""

import torch
import triton
import triton.language as tl

from ercn.kernels.configs import cdiv

# The interpreter multiplies the bits of bfloat16 as integers and truncates when it narrows to it.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def nearest(x, DROP: tl.constexpr):
    """float32 x rounded to nearest even, its last DROP bits 0; every NaN becomes one that survives truncation."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) & -(1 << DROP)
    return tl.where(tl.abs(x) <= float("inf"), rounded.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x rounded to dtype, to nearest even."""
    if INTERPRETED and x.dtype == tl.float32 and dtype == tl.bfloat16:
        x = nearest(x, 16)
    return x.to(dtype)


@triton.jit
def factor(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x as a factor of products in dtype; float32 is rounded to TF32 where PRECISION says so: hardware truncates."""
    if PRECISION == "tf32" and x.dtype == tl.float32 and dtype == tl.float32:
        x = nearest(x, 13)
    return narrow(x, dtype)


@triton.jit
def round_kernel(x, out, size, BLOCK: tl.constexpr):
    """out = x in TF32, for float32 tensors of the same dense layout."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, factor(tl.load(x + i, mask=i < size), tl.float32, "tf32"), mask=i < size)


def rounded(x: torch.Tensor, precision: str) -> torch.Tensor:
    """x as a factor of products, rounded once in memory where these are TF32."""
    if precision != "tf32" or x.dtype != torch.float32 or x.numel() == 0:
        return x
    out = torch.empty_like(x)
    if out.stride() != x.stride():  # x has gaps
        x = out.copy_(x)
    round_kernel[(cdiv(x.numel(), 1024),)](x, out, x.numel(), BLOCK=1024)
    return out


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in float32. PRECISION is that of float32 factors; half-precision factors are multiplied exactly."""
    FACTORS: tl.constexpr = PRECISION if a.dtype == tl.float32 else "ieee"
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # A limit on imprecise sums keeps the compiler from folding the addition in ``accumulate`` into the product.
    return tl.dot(a, b, acc, input_precision=FACTORS, max_num_imprecise_acc=1)


@triton.jit
def split(x, TERMS: tl.constexpr, FULL: tl.constexpr):
    """float32 x as a tuple of TERMS bfloat16 terms whose sum is x to 8 bits a term; FULL: x itself."""
    if FULL:
        terms = (x,)
    else:
        high = narrow(x, tl.bfloat16)
        terms = (high,)
        if TERMS == 2:
            terms = (high, narrow(x - high.to(tl.float32), tl.bfloat16))
    return terms


@triton.jit
def dot_terms(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b for factors given as terms; the product of the two low terms is below their rounding."""
    acc = dot(a[0], b[0], acc, PRECISION)
    if len(b) == 2:
        acc = dot(a[0], b[1], acc, PRECISION)
    if len(a) == 2:
        acc = dot(a[1], b[0], acc, PRECISION)
    return acc


@triton.jit
def accumulate(total, a, b, PRECISION: tl.constexpr):
    """total + a·b for one step of a long sum: added in float32, since tensor cores truncate what they add to."""
    return total + dot_terms(a, b, tl.zeros_like(total), PRECISION)


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a·b for one step of a sum that is rounded to the factors' dtype in the end.

    Factors of 16 bits are summed in the tensor cores, which saves the registers of a second accumulator. For n terms of
    one sign these lose about n / 16 · 2^-25, 3e-5 for 16,384 and 1.2e-4 for 65,536; bfloat16 rounds by up to 2^-9.
    """
    if a.dtype == tl.float32:
        total = accumulate(total, (a,), (b,), PRECISION)
    else:
        total = dot(a, b, total, PRECISION)
    return total


@triton.jit
def transpose(terms):
    """Every tile of a tuple of one or two, transposed."""
    transposed = (tl.trans(terms[0]),)
    if len(terms) == 2:
        transposed = (tl.trans(terms[0]), tl.trans(terms[1]))
    return transposed
