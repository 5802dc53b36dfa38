"""A prompt that comes again does not run the text encoders, and the image is the same to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

import accel
from accel.errors import UserError

CALL = dict(height=32, width=32, steps=1, output_type="np")


def counted(pipe, name: str = "text_encoder") -> list[int]:
    """The rows of each call of a text encoder from now on."""
    rows: list[int] = []
    engine = pipe.engines[name]
    run = engine.run
    engine.run = lambda feeds: (rows.append(len(feeds["input_ids"])), run(feeds))[1]
    return rows


@pytest.fixture(params=["eager", "onnxruntime"])
def pipe(request, smallest_bundle):
    with accel.load(smallest_bundle, request.param, device="cpu") as loaded:
        yield loaded


def test_the_same_prompts_run_it_once_and_make_the_same_bits(pipe, smallest_bundle):
    rows = counted(pipe)
    first, again = (pipe("the cat", "a dog", seed=1, **CALL).images for _ in range(2))
    assert rows == [2]  # the prompt and the negative one, in one call
    assert np.array_equal(first, again)
    with accel.load(smallest_bundle, pipe.engines["unet"].name, device="cpu", text_cache=0) as without:
        rows = counted(without)
        assert np.array_equal(first, without("the cat", "a dog", seed=1, **CALL).images)
        without("the cat", "a dog", seed=1, **CALL)
        assert rows == [2, 2]


def test_whatever_changes_the_conditioning_runs_it_again(pipe):
    rows = counted(pipe)
    for call in (
        dict(prompt="the cat"),
        dict(prompt="the cat", negative_prompt="a dog"),
        dict(prompt="the dog"),
        dict(prompt=["the cat", "the dog"]),
        dict(prompt="the cat", guidance_scale=1.0),
        dict(prompt="the (cat:1.3)", prompt_weights=True),
    ):
        before = len(rows)
        pipe(seed=0, **call, **CALL)
        assert len(rows) > before, call
        before = len(rows)
        pipe(seed=5, **call, **CALL)
        assert len(rows) == before, call
    assert pipe.text_cache.made == 6


def test_other_weights_of_the_encoder_run_it_again(pipe):
    name = "text_model.final_layer_norm.weight"
    width = pipe.bundle.component("text_encoder").outputs[0].shape[-1]
    weights = {_known(pipe, name): np.full(width, 2, np.float32)}
    own = pipe("the cat", seed=0, **CALL).images
    pipe.engines.set_weights({"text_encoder": weights})
    other = pipe("the cat", seed=0, **CALL).images
    pipe.engines.set_weights({})
    assert not np.array_equal(own, other) and np.array_equal(own, pipe("the cat", seed=0, **CALL).images)
    pipe.engines["text_encoder"].set_weights(weights)  # behind the pipeline's back
    assert np.array_equal(other, pipe("the cat", seed=0, **CALL).images)


def _known(pipe, name: str) -> str:
    """The weight's name in this bundle: transformers 5 has one part less in it."""
    from safetensors import safe_open

    with safe_open(pipe.bundle.file(pipe.bundle.component("text_encoder").weights), "np") as file:
        return next(key for key in file.keys() if name.removeprefix("text_model.") in key)  # noqa: SIM118


def test_a_text_encoder_that_takes_one_row_is_called_once_for_each(pipe, monkeypatch):
    from dataclasses import replace

    from accel.bundle.shape_profiles import fixed

    engine = pipe.engines["text_encoder"]
    engine.component = replace(engine.component, dims={**engine.component.dims, "images": fixed(1)})
    rows = counted(pipe)
    pipe("the cat", "a dog", seed=1, **CALL)
    assert rows == [1, 1]


def test_with_low_memory_the_text_encoder_is_not_even_loaded_again(smallest_bundle):
    with accel.load(smallest_bundle, "onnxruntime", low_memory=True) as pipe:
        first = pipe("the cat", seed=1, **CALL).images
        assert "text_encoder" not in pipe.engines._loaded
        loader, loads = pipe.engines._loaders["text_encoder"], []
        pipe.engines._loaders["text_encoder"] = lambda **how: (loads.append(how), loader(**how))[1]
        assert np.array_equal(first, pipe("the cat", seed=1, **CALL).images) and loads == []
        pipe("the dog", seed=1, **CALL)
        assert loads == [{}]


@pytest.mark.parametrize("size", [-1, 1.5, True, "many"])
def test_a_size_that_is_no_count_is_refused(size, smallest_bundle):
    with pytest.raises(UserError, match="invalid text_cache"):
        accel.load(smallest_bundle, "eager", text_cache=size)
