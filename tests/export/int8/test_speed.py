"""When an int8 network has been timed long enough."""

import numpy as np
import pytest

from accel.export.int8 import speed


@pytest.mark.parametrize(
    ("speedup", "spread", "enough"),
    [(2.5, 0.05, True), (0.8, 0.05, True), (1.05, 0.05, False), (1.2, 0.5, False), (0.97, 0.001, False)],
)
def test_rounds_end_where_more_of_them_would_decide_nothing_else(speedup, spread, enough):
    rng = np.random.default_rng(0)
    int8 = 0.1 * np.exp(spread * rng.standard_normal(9))
    floating = 0.1 * speedup * np.exp(spread * rng.standard_normal(9))
    assert speed.decided(floating, int8) is enough
    assert not speed.decided(floating[:4], int8[:4])  # too few for an interval
