"""Named shape profiles as TensorRT optimization profiles, for every network of a pipeline."""

from __future__ import annotations

import pytest

from accel.bundle import Component
from accel.bundle.shape_profiles import profile
from accel.bundle.tensor_spec import TensorSpec
from accel.export.tensorrt.shapes import described, profiles_of, shapes_of

LATENT = ("latent_height", "latent_width")
INPUTS = {
    "unet": (
        TensorSpec("sample", "float16", ("batch", 4, *LATENT)),
        TensorSpec("timestep", "float32", ()),
        TensorSpec("encoder_hidden_states", "float16", ("batch", 77, 768)),
    ),
    "vae_decoder": (TensorSpec("latent_sample", "float16", ("images", 4, *LATENT)),),
    "vae_encoder": (TensorSpec("sample", "float16", ("images", 3, "height", "width")),),
    "text_encoder": (TensorSpec("input_ids", "int64", ("images", 77)),),
}


def shapes(name: str, kind: str, guidance: bool = True):
    dims = profile(name).dims(vae_scale=8, latent_multiple=8, guidance=guidance)
    used = {d: dims[d] for spec in INPUTS[kind] for d in spec.shape if isinstance(d, str)}
    return shapes_of(
        Component(kind, kind, f"{kind}/model.onnx", f"{kind}/model.safetensors", INPUTS[kind], (), used), dims
    )


@pytest.mark.parametrize("side", [512, 768, 1024])
def test_a_size_of_the_field_with_one_to_eight_images(side):
    name, cells = f"batch=1-8,size={side}", side // 8
    unet = shapes(name, "unet")
    assert unet["sample"] == [[batch, 4, cells, cells] for batch in (1, 2, 16)]
    assert unet["encoder_hidden_states"] == [[batch, 77, 768] for batch in (1, 2, 16)] and "timestep" not in unet
    assert shapes(name, "vae_decoder")["latent_sample"] == [[batch, 4, cells, cells] for batch in (1, 1, 8)]
    assert shapes(name, "vae_encoder")["sample"] == [[batch, 3, side, side] for batch in (1, 1, 8)]
    assert shapes(name, "text_encoder") == {"input_ids": [[1, 77], [1, 77], [8, 77]]}


def test_a_dynamic_range():
    assert shapes("dynamic", "unet", guidance=False)["sample"] == [[1, 4, 32, 32], [1, 4, 64, 64], [16, 4, 128, 128]]
    assert shapes("dynamic", "vae_encoder")["sample"] == [[1, 3, 256, 256], [1, 3, 512, 512], [8, 3, 1024, 1024]]


@pytest.mark.parametrize("kind", INPUTS)
def test_a_static_profile_leaves_nothing_free(kind):
    assert shapes("sd-512-static", kind) == {}


def test_guidance_doubles_the_batch_of_the_unet(bundle):
    """It is 5 in this bundle; a range leaves room for both."""
    unet = bundle.component("unet")
    first, second = (
        described(bundle, unet, profile)
        for profile in profiles_of(bundle, ["batch=1,size=64", "batch=1-4,height=64-128,width=128"])
    )
    assert first["shapes"]["sample"] == [[2, 4, 16, 16]] * 3
    assert second["shapes"]["sample"] == [[1, 4, 16, 32], [2, 4, 32, 32], [8, 4, 32, 32]]
    assert second["shapes"]["encoder_hidden_states"][0] == [1, 77, 32] and "timestep" not in first["shapes"]
