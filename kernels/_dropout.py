"""Dropout's random bits from a counter: the backward forms them again, nothing is stored.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The counter of row i and hidden
unit l is (i, 0, l // 64 · 16 + l % 16, 0), the key is the two halves of the seed. Of the four words, l // 16 % 4 is the
unit's: its low 16 bits decide the first branch, its high 16 bits the gate. So one block serves four units of both.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(seed, row, counter):
    """The four words of the counters (row, 0, counter, 0) for row [M, 1] and counter [1, C]: each uint32 [M, C].

    64-bit products give both halves at once. By broadcasting, two of the ten rounds are formed per row and per counter.
    """
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    a = row.to(tl.uint32)
    b = tl.zeros_like(a)
    c = counter.to(tl.uint32)
    d = tl.zeros_like(c)
    for i in tl.static_range(10):
        if i > 0:
            k0 += 0x9E3779B9
            k1 += 0xBB67AE85
        x = a.to(tl.uint64) * 0xD2511F53
        y = c.to(tl.uint64) * 0xCD9E8D57
        a = (y >> 32).to(tl.uint32) ^ b ^ k0
        c = (x >> 32).to(tl.uint32) ^ d ^ k1
        b = y.to(tl.uint32)
        d = x.to(tl.uint32)
    return a, b, c, d


@triton.jit
def unit_words(seed, r, first_unit, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr):
    """The word of rows r and units first_unit + 0 … BLOCK_L - 1, a multiple of BLOCK_L: uint32 [BLOCK_M, BLOCK_L]."""
    COUNTERS: tl.constexpr = BLOCK_L // 4 if BLOCK_L > 64 else 16
    counter = first_unit // 64 * 16 + tl.arange(0, COUNTERS)
    a, b, c, d = philox(seed, r[:, None], counter[None, :])
    if BLOCK_L >= 64:
        words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK_M, COUNTERS // 16, 16, 2, 2))
        words = tl.permute(words, (0, 1, 4, 3, 2))
    else:  # 32 of the 64 units of the blocks
        tl.static_assert(BLOCK_L == 32)
        lower = first_unit % 64 == 0
        words = tl.permute(tl.join(tl.where(lower, a, c), tl.where(lower, b, d)), (0, 2, 1))
    return tl.reshape(words, (BLOCK_M, BLOCK_L))


@triton.jit
def dropout_factor(dropout, r, first_unit, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr):
    """What multiplies the branches' product: 0 where one of the two is dropped, else scale: [BLOCK_M, BLOCK_L].

    dropout: seed, threshold in 1 … 65536, and scale; a branch is dropped where its 16 bits are below the threshold.
    """
    words = unit_words(tl.load(dropout.seed), r, first_unit, BLOCK_M, BLOCK_L)
    last = (tl.cast(dropout.threshold, tl.uint32) << 16) - 1  # the last dropped word, by its high bits
    lowest = words << 16
    if GATED:
        lowest = tl.minimum(lowest, words)
    return tl.where(lowest <= last, 0.0, dropout.scale)
