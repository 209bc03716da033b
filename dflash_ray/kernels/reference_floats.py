"""float32 arithmetic of the compiled operators, operation by operation, so that noise and masses are theirs to the bit.

Constants and order are those of csrc/verify_core.cuh.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_EXP = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
)  # fmt: skip
_ROOT_OF_HALF = np.uint32(0x3F3504F3)
_ROOT = 23726566  # the root of 1/2 in units of 2**-25


def fma(a: Floats, b: Floats | float, c: Floats | float) -> Floats:
    """a * b + c, rounded once.

    The product is exact in float64. The sum is rounded to odd there, which no second rounding to float32 can spoil.
    """
    added = np.asarray(c, dtype=np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):  # of infinite logits
        product = a.astype(np.float64) * np.asarray(b, dtype=np.float32).astype(np.float64)
        total = product + added
        back = total - product
        error = (product - (total - back)) + (added - back)
    bits = total.view(np.int64)
    is_even = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    outwards = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(is_even, bits + outwards, bits).view(np.float64).astype(np.float32)


def _log_near_one(x: Floats, exponent: Floats) -> Floats:
    p = np.full_like(x, _LOG[0])
    for coefficient in _LOG[1:]:
        p = fma(p, x, coefficient)
    square = x * x
    p = fma(exponent, -2.12194440e-4, p * x * square)
    p = fma(square, -0.5, p)
    return fma(exponent, 0.693359375, x + p)


def log(values: Floats) -> Floats:
    """Natural logarithm of positive, normal floats."""
    above = values.view(np.uint32) - _ROOT_OF_HALF
    mantissa = ((above & np.uint32(0x7FFFFF)) + _ROOT_OF_HALF).view(np.float32)
    return _log_near_one(mantissa - np.float32(1), (above.view(np.int32) >> 23).astype(np.float32))


def gumbel(uniforms: NDArray[np.float64]) -> Floats:
    """Standard Gumbel noise of uniforms that are odd multiples of 2**-25."""
    fraction, exponent = np.frexp(uniforms)  # at least 1/2
    mantissa = (fraction * 2**25).astype(np.int64)
    is_high = mantissa > _ROOT
    x = np.where(is_high, (mantissa - 2**25) * 2.0**-25, (mantissa - 2**24) * 2.0**-24).astype(np.float32)
    return -log(-_log_near_one(x, np.where(is_high, exponent, exponent - 1).astype(np.float32)))


def exp_of_nonpositive(x: Floats) -> Floats:
    """exp(x) for x <= 0; 0 below -87 and for NaN."""
    counts = x >= -87
    clamped = np.where(counts, x, np.float32(-87))
    n = np.floor(fma(clamped, 1.44269504, 0.5))
    r = fma(n, 2.12194440e-4, fma(n, -0.693359375, clamped))
    p = np.full_like(r, _EXP[0])
    for coefficient in _EXP[1:]:
        p = fma(p, r, coefficient)
    p = fma(p * r, r, r) + np.float32(1)
    scale = ((n.astype(np.int32) + 127) << 23).view(np.float32)
    return np.where(counts, p * scale, np.float32(0))
