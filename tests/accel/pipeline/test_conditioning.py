"""Conditioning and noise as pure functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accel.errors import UserError
from accel.pipeline.conditioning import guidance_embedding, time_ids
from accel.sampling import noise


@pytest.mark.parametrize(("guidance", "width"), [(1.0, 256), (7.5, 256), (8.0, 32), (4.0, 33)])
def test_guidance_embedding_equals_diffusers(guidance, width):
    from diffusers import StableDiffusionPipeline

    reference = StableDiffusionPipeline.get_guidance_scale_embedding
    expected = reference(None, torch.tensor([guidance - 1.0] * 2), embedding_dim=width).numpy()
    # The reference computes angles of up to 7,000 in float32, which is good to about 5e-4.
    assert np.allclose(guidance_embedding(2, guidance, width), expected, atol=1e-3)


def test_time_ids_are_original_size_crop_and_target_size():
    assert time_ids(2, (768, 1344)).tolist() == [[768, 1344, 0, 0, 768, 1344]] * 2
    assert time_ids(1, (64, 96), (512, 600), (3, 4), (70, 80)).tolist() == [[512, 600, 3, 4, 70, 80]]
    with pytest.raises(UserError, match="size conditioning"):
        time_ids(1, (64, 64), crop=(1,))


def test_noise_is_a_function_of_seed_and_draw_alone():
    a = noise.normal([5, 6], 0, (4, 8, 8))
    assert a.dtype == np.float32
    assert np.array_equal(a[1:], noise.normal([6], 0, (4, 8, 8)))
    assert not np.array_equal(a[0], noise.normal([5], 1, (4, 8, 8))[0])


def test_noise_is_standard_normal_and_independent():
    x = noise.normal(range(64), 0, (4, 16, 16)).reshape(64, -1)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    correlation = np.corrcoef(x) - np.eye(64)
    assert np.abs(correlation).max() < 0.2
