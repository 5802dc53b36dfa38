"""Contact sheets."""

from __future__ import annotations

import numpy as np

from accel.sheet import contact_sheet


def test_contact_sheet_has_a_row_per_engine_and_keeps_the_pixels():
    red, blue = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = np.asarray(contact_sheet({"one": red, "two": blue}, ["a", "b"], cell=32, gain={"two": 50}))
    assert (sheet == [255, 0, 0]).all(-1).sum() == 2 * 32 * 32
    assert (sheet == [0, 0, 255]).all(-1).sum() == 2 * 32 * 32
    assert (sheet == [30, 30, 30]).all(-1).any()  # labels are written
