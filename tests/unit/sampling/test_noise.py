"""The generator is Philox4x32-10, and a draw depends on its key alone."""

import numpy as np
import pytest

from dflash_ray.sampling.noise import MAX_GUMBEL, Purpose, gumbel, philox, uniform

ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = philox(np.array(counter, dtype=np.uint64)[:, None], key)
    assert tuple(int(word) for word in words[:, 0]) == answer


def test_a_draw_does_not_depend_on_the_other_tokens_drawn():
    ids = np.arange(1000)
    together = uniform(5, 77, ids, Purpose.TARGET)
    assert np.array_equal(together[[3, 500, 999]], uniform(5, 77, np.array([3, 500, 999]), Purpose.TARGET))


def test_seeds_positions_and_purposes_are_independent_streams():
    ids = np.arange(4096)
    base = uniform(1, 2, ids, Purpose.TARGET)
    for other in (
        uniform(2, 2, ids, Purpose.TARGET),
        uniform(1 + 2**32, 2, ids, Purpose.TARGET),
        uniform(1, 3, ids, Purpose.TARGET),
        uniform(1, 2 + 2**32, ids, Purpose.TARGET),
        uniform(1, 2, ids, Purpose.RESIDUAL),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.1


def test_uniforms_are_open_and_the_noise_is_bounded():
    largest = -np.log(-np.log(1 - 2.0**-25))
    assert largest < MAX_GUMBEL
    noise = gumbel(9, 9, np.arange(200_000))
    assert np.isfinite(noise).all() and noise.max() <= MAX_GUMBEL
