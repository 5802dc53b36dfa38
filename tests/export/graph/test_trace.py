"""Tracing: a graph takes every size of its profile, however few these are."""

from __future__ import annotations

import numpy as np

import accel
from accel.export import export_pipeline


def test_a_profile_of_two_sizes_is_exported(sd15, tmp_path):
    """The example that is traced is of three units, which two sizes do not have."""
    bundle = export_pipeline(
        sd15, tmp_path / "bundle", profile="batch=1,height=32,width=32-64", components=("vae_decoder",)
    )
    decoder = accel.load_engine(bundle, "vae_decoder", "onnxruntime", threads=1)
    (latents,) = bundle.component("vae_decoder").inputs
    for width in (32, 64):
        (image,) = decoder(**{latents.name: np.zeros((1, 4, 8, width // 4), np.float32)}).values()
        assert image.shape == (1, 3, 32, width)
