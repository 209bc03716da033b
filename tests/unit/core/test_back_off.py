from dflash_ray.core.back_off import BackOff


def test_pauses_double_up_to_the_longest_until_an_attempt_goes_well():
    back_off = BackOff(0.5, 3.0)
    assert [back_off.next() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    back_off.reset()
    assert (back_off.next(), back_off.pause_s) == (0.5, 1.0)
