from dataclasses import asdict

import numpy as np
import pytest

from accel import records
from accel.bundle.shape_profiles import Range, fixed
from accel.bundle.tensor_spec import TensorSpec, check, dtype_name
from accel.errors import UserError

SPECS = (
    TensorSpec("sample", "float32", ("batch", 4, "latent_height", "latent_width")),
    TensorSpec("timestep", "float32", ()),
    TensorSpec("encoder_hidden_states", "float32", ("batch", 77, 32)),
)
DIMS = {"batch": Range(1, 2, 4), "latent_height": Range(8, 8, 16, 8), "latent_width": fixed(8)}


def feeds(batch=2, height=8, width=8, **changes):
    values = {
        "sample": np.zeros((batch, 4, height, width), np.float32),
        "timestep": np.zeros((), np.float32),
        "encoder_hidden_states": np.zeros((batch, 77, 32), np.float32),
    }
    return values | changes


def refusal(values) -> UserError:
    with pytest.raises(UserError) as caught:
        check("unet", SPECS, DIMS, "narrow", values)
    assert caught.value.message.startswith("unet: ")
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("height", [8, 16])
def test_what_the_profile_allows_passes(batch, height):
    check("unet", SPECS, DIMS, "narrow", feeds(batch, height))


def test_torch_tensors_are_judged_like_numpy_arrays():
    import torch

    values = {name: torch.from_numpy(value) for name, value in feeds().items()}
    check("unet", SPECS, DIMS, "narrow", values)
    assert "sample is float16" in refusal(values | {"sample": values["sample"].half()}).message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (feeds(batch=5), ["batch 5", "narrow", "1 to 4"]),
        (feeds(batch=0), ["batch 0", "narrow"]),
        (feeds(height=24), ["latent height 24", "narrow", "8 to 16 in steps of 8"]),
        (feeds(height=12), ["latent height 12", "narrow"]),
        (feeds(width=16), ["latent width 16", "narrow"]),
    ],
)
def test_a_size_outside_the_profile_names_the_dimension_and_the_profile(values, words):
    error = refusal(values)
    assert all(word in error.message for word in words), error.message


def test_a_dimension_must_agree_between_tensors():
    error = refusal(feeds(batch=2, encoder_hidden_states=np.zeros((3, 77, 32), np.float32)))
    assert "encoder_hidden_states" in error.message and "batch should be 2" in error.message
    assert "narrow" in error.fix


def test_a_fixed_axis_must_be_right():
    error = refusal(feeds(encoder_hidden_states=np.zeros((2, 76, 32), np.float32)))
    assert "encoder_hidden_states has shape (2, 76, 32), where axis 1 should be 77" in error.message


def test_a_missing_or_extra_axis_is_named():
    assert "timestep has shape (1,)" in refusal(feeds(timestep=np.zeros(1, np.float32))).message
    assert "sample has shape (4, 8, 8)" in refusal(feeds(sample=np.zeros((4, 8, 8), np.float32))).message


def test_swapped_inputs_are_caught():
    values = feeds()
    values["sample"], values["encoder_hidden_states"] = values["encoder_hidden_states"], values["sample"]
    assert "sample" in refusal(values).message


def test_another_dtype_is_named_and_never_converted_silently():
    error = refusal(feeds(sample=np.zeros((2, 4, 8, 8), np.float64)))
    assert "sample is float64, not float32" in error.message and "float32" in error.fix


def test_missing_and_unknown_names_are_both_told():
    values = feeds()
    values["latents"] = values.pop("sample")
    error = refusal(values)
    assert "missing sample" in error.message and "unknown latents" in error.message
    assert "encoder_hidden_states, sample, timestep" in error.fix


@pytest.mark.parametrize("value", [[1.0, 2.0], 3.5, None, "text"])
def test_what_is_no_array_is_refused_by_name(value):
    error = refusal(feeds(timestep=value))
    assert "timestep" in error.message and type(value).__name__ in error.message


def test_spec_survives_json():
    for spec in SPECS:
        assert records.read(TensorSpec, asdict(spec), "tensor") == spec


def test_timestep_and_sizes_in_pixels_do_not_follow_the_networks_dtype():
    assert not TensorSpec("timestep", "float32", ()).is_activation
    assert not TensorSpec("time_ids", "float32", ("batch", 6)).is_activation
    assert not TensorSpec("input_ids", "int64", ("images", 77)).is_activation
    assert TensorSpec("sample", "float32", ("batch", 4)).is_activation
    assert TensorSpec("sample", "bfloat16", ("batch", 4)).is_activation


def test_dtype_names_are_numpys_on_both_sides():
    import torch

    assert dtype_name(np.zeros(1, np.float16)) == dtype_name(torch.zeros(1, dtype=torch.float16)) == "float16"
