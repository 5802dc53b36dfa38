"""Nearest-neighbour upsampling by two and the 3 x 3 convolution after it as one operator: the algebra.

Each output pixel of the convolution sees four different input pixels at most, because upsampling repeated them. Taps
that meet the same pixel are added up: 4 multiplications a pixel are left of 9, and the larger tensor is never written.
"""

from __future__ import annotations

import numpy as np

# Fewer input channels gain nothing (digits: 32 to 64), and int8 would round without need.
CHANNELS = 128


def transposed(weight: np.ndarray) -> np.ndarray:
    """The transposed convolution that equals upsampling and a convolution.

    Args:
        weight: of the convolution, floating [out, in, 3, 3].

    Returns:
        [in, out, 4, 4], for stride 2 and padding 1; entries are sums of one, two or four of `weight`'s.
    """
    for axis in (2, 3):
        first, middle, last = np.moveaxis(weight, axis, 0)
        weight = np.stack([last, middle + last, first + middle, first], axis)
    return np.ascontiguousarray(weight.swapaxes(0, 1))


def phases(weight: np.ndarray) -> np.ndarray:
    """A convolution for each position of an output pixel in its pair of rows and pair of columns.

    Args:
        weight: floating [out, in, 3, 3].

    Returns:
        [4 out, in, 2, 2], for padding 1: the positions (0, 0), (0, 1), (1, 0), (1, 1) one after the other. Position
        (a, b) is found in rows a to a + height and columns b to b + width of its result.
    """
    found = [weight]
    for axis in (2, 3):
        pairs = []
        for one in found:
            first, middle, last = np.moveaxis(one, axis, 0)
            pairs += [np.stack([first, middle + last], axis), np.stack([first + middle, last], axis)]
        found = pairs
    return np.concatenate(found)
