"""What every kernel shares: rounding, products with a stated precision, factors split in two terms."""

import triton
import triton.language as tl

# The interpreter multiplies the bits of bfloat16 as integers and truncates when it narrows to it.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x rounded to dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(tl.abs(x) <= float("inf"), rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in float32. PRECISION is that of float32 factors; half-precision factors are multiplied exactly."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


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
def transpose(terms):
    """Every tile of a tuple of one or two, transposed."""
    transposed = (tl.trans(terms[0]),)
    if len(terms) == 2:
        transposed = (tl.trans(terms[0]), tl.trans(terms[1]))
    return transposed
