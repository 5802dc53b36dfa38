"""The verdict is diffusers': its rounding to thousandths, and what special care changes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion import safety_checker as theirs

from accel.safety.verdict import rejected


def of_diffusers(monkeypatch, special, concepts, special_thresholds, thresholds) -> list[bool]:
    """What diffusers' class says of given cosines."""
    cosines = iter([torch.from_numpy(special), torch.from_numpy(concepts)])
    monkeypatch.setattr(theirs, "cosine_distance", lambda image, text: next(cosines))
    checker = SimpleNamespace(
        vision_model=lambda shown: (None, shown),
        visual_projection=lambda pooled: pooled,
        special_care_embeds=None,
        concept_embeds=None,
        special_care_embeds_weights=torch.from_numpy(special_thresholds),
        concept_embeds_weights=torch.from_numpy(thresholds),
    )
    images = [np.ones((2, 2, 3))] * len(special)
    return theirs.StableDiffusionSafetyChecker.forward(checker, torch.zeros(len(special), 1), images)[1]


def test_it_is_that_of_diffusers_class_close_to_the_thresholds(monkeypatch):
    rng = np.random.default_rng(0)
    special_thresholds = rng.uniform(0.15, 0.25, 3).astype(np.float32)
    thresholds = rng.uniform(0.15, 0.25, 17).astype(np.float32)
    # Half-thousandths around the thresholds, where rounding decides, and a little noise on half of them.
    steps = rng.integers(-24, 2, (3000, 20)) * 0.0005 + rng.normal(0, 1e-5, (3000, 20)) * rng.integers(0, 2, (3000, 1))
    special = (special_thresholds + steps[:, :3] + 0.0095).astype(np.float32)
    special[::3] = 0  # needs no care
    concepts = (thresholds + steps[:, 3:] - 0.002).astype(np.float32)
    concepts[:, 3:] = 0
    expected = of_diffusers(monkeypatch, special, concepts, special_thresholds, thresholds)
    found = rejected(special - special_thresholds, concepts - thresholds)
    assert found == expected and 300 < sum(found) < 2700
    without_care = rejected(np.full((3000, 3), -1), concepts - thresholds)
    assert sum(without_care) < sum(found)  # for some images the care decides


def test_half_a_thousandth_is_nothing_and_more_is_something():
    nothing, care = np.float32([[-1]]), np.float32([[0.001]])
    assert rejected(nothing, np.float32([[0.0004]])) == [False]
    assert rejected(nothing, np.float32([[0.0006]])) == [True]
    assert rejected(nothing, np.float32([[-0.009]])) == [False]
    assert rejected(care, np.float32([[-0.009]])) == [True]
    assert rejected(np.float32([[0.0004]]), np.float32([[-0.009]])) == [False]
    assert rejected(np.zeros((0, 3)), np.zeros((0, 17))) == []
