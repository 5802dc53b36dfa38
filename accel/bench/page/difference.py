"""How two images differ, as one that a person can read: scaled by a factor that is stated, on a scale of colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FACTORS = (255, 100, 50, 20, 10, 5, 2, 1)
# Light for equal pixels to dark for the largest difference, rising in darkness all the way.
SCALE = ((236, 239, 243), (252, 211, 132), (240, 138, 75), (197, 48, 48), (84, 13, 48))


@dataclass(frozen=True)
class Difference:
    """What lies between two images.

    Attributes:
        levels: uint8 [H, W], the largest difference of a pixel's channels.
        most: the largest of them, of 255.
        share: of the pixels that differ, 0..1.
        factor: by which levels are multiplied to fill the colour scale.
    """

    levels: np.ndarray
    most: int
    share: float
    factor: int

    @property
    def top(self) -> int:
        """The level at the end of the colour scale."""
        return max(1, 255 // self.factor)


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Compare two uint8 images [H, W, 3]. The factor is the largest that no pixel runs over the scale with."""
    levels = np.abs(a.astype(np.int16) - b).max(-1).astype(np.uint8)
    most = int(levels.max())
    factor = next(factor for factor in FACTORS if most * factor <= 255)
    return Difference(levels, most, float((levels > 0).mean()), factor)


def coloured(found: Difference) -> np.ndarray:
    """The levels on the colour scale, uint8 [H, W, 3]."""
    stops = np.linspace(0, 255, len(SCALE))
    value = found.levels.astype(np.int32) * found.factor
    channels = [np.interp(value, stops, [colour[i] for colour in SCALE]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def in_words(found: Difference) -> str:
    """The same as a sentence, for those who do not see the colours."""
    if not found.most:
        return "identical: every pixel has the same value"
    amount = f"{100 * found.share:.3g} %" if found.share >= 1e-4 else "less than 0.01 %"
    return f"{amount} of the pixels differ, by at most {found.most} of 255"


def gradient() -> str:
    """The colour scale for CSS."""
    return f"linear-gradient(to right, {', '.join('rgb' + str(colour) for colour in SCALE)})"
