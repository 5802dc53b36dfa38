"""The estimate of the memory that a build needs."""

from __future__ import annotations

import pytest

from accel.export.tensorrt.build import build
from accel.export.tensorrt.memory import peak


@pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)
def test_the_memory_estimate_warns_when_the_gpu_is_full(bundle, tensorrt, monkeypatch):
    from accel.export.tensorrt.build import Cuda

    monkeypatch.setattr(Cuda, "free_bytes", 1000)
    said = []
    build(bundle, ("vae_decoder",), announce=said.append)
    assert "only 0.0 GB are free on the GPU" in said[0]


def test_the_activation_estimate_counts_what_lives_at_once(bundle):
    component = bundle.component("vae_decoder")
    small, sizes = ({name: getattr(limits, end) for name, limits in component.dims.items()} for end in ("min", "max"))
    # Four images of 32 x 32 latents: the scores of the decoder's one attention, before and after softmax.
    scores = 4 * (32 * 32) ** 2 * 4
    assert 2 * scores <= peak(bundle, component, sizes) <= 4 * scores
    # Four times the images and four times the cells; scores grow with the square of the cells.
    assert 16 <= peak(bundle, component, sizes) / peak(bundle, component, small) <= 64


def test_the_activation_estimate_knows_every_shape_of_a_unet(bundle):
    """Eight times the batch and four times the cells: 32 times the activations, and attention grows faster."""
    unet = bundle.component("unet")
    small, large = (
        peak(bundle, unet, {name: getattr(limits, end) for name, limits in unet.dims.items()}) for end in ("min", "max")
    )
    assert 32 * small <= large <= 128 * small
