"""The verdict of diffusers' StableDiffusionSafetyChecker, from the scores of its network.

A score is a cosine similarity of the image with a concept, less the concept's own threshold. The rule is that of
Rando et al., "Red-Teaming the Stable Diffusion Safety Filter" (arXiv 2210.04610), as diffusers computes it.
"""

from __future__ import annotations

import numpy as np

DIGITS = 3  # scores are rounded to thousandths before they are compared with zero
STRICTER = np.float32(0.01)  # added to every concept's score where a special-care concept is seen


def rejected(special_care: np.ndarray, concepts: np.ndarray) -> list[bool]:
    """Which images are rejected: one concept whose rounded score is above zero is enough.

    Args:
        special_care: float32 scores [images, S]; a rounded one above zero makes the concepts stricter.
        concepts: float32 scores [images, C].
    """
    special_care, concepts = np.asarray(special_care, np.float32), np.asarray(concepts, np.float32)
    care = (np.round(special_care, DIGITS) > 0).any(axis=1, keepdims=True)
    scores = np.round(concepts + np.where(care, STRICTER, np.float32(0)), DIGITS)
    return [bool(found) for found in (scores > 0).any(axis=1)]
