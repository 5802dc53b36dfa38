"""Previews of images in the making, and callbacks that stop it."""

import numpy as np
import pytest
from PIL import Image

import accel
from accel.errors import Stopped, UserError
from accel.pipeline.previews import linear_map
from accel.pipeline.previews.previewer import Previewer

PROMPT = "a handwritten seven"


@pytest.fixture(scope="module")
def pipe():
    with accel.load("digits/4step-int8", "onnxruntime", threads=1) as loaded:
        yield loaded


def test_a_map_that_is_linear_is_found_again():
    x = linear_map.probes(4, (8, 8), 3)
    assert x.shape == (3, 4, 8, 8) and x.std() == pytest.approx(1, abs=1e-5)
    factors, bias = np.arange(12).reshape(3, 4) / 10, np.array([0.1, 0.2, -0.3])
    small = np.einsum("rc,nchw->nrhw", factors, x) + bias[:, None, None]
    found = linear_map.fit(x, np.repeat(np.repeat(small, 4, axis=2), 4, axis=3))
    assert np.allclose(found.factors, factors, atol=1e-5) and np.allclose(found.bias, bias, atol=1e-5)
    assert found.error < 1e-5 and np.allclose(found(x), small, atol=1e-4)
    assert linear_map.LinearMap.from_dict(found.as_dict()) == found


def test_previews_look_like_the_image_and_do_not_change_it(pipe):
    seen = []
    how = dict(seed=3, sampler="ddim", steps=8)
    watched = pipe(PROMPT, preview_every=2, preview_callback=lambda i, images: seen.append((i, images)), **how)
    assert [i for i, _ in seen] == [1, 3, 5, 7]
    image = watched.images[0]
    assert np.array_equal(np.asarray(image), np.asarray(pipe(PROMPT, **how).images[0]))
    assert all(isinstance(one, Image.Image) and one.size == image.size for _, (one,) in seen)
    likeness = [
        np.corrcoef(np.asarray(one, float).ravel(), np.asarray(image, float).ravel())[0, 1] for _, (one,) in seen
    ]
    assert likeness[-1] > 0.85 and likeness[-1] > likeness[0] - 0.01


def test_a_map_of_the_bundle_is_used_and_a_tiny_vae_decodes_itself(pipe, monkeypatch):
    from dataclasses import replace

    kept = {"factors": [[1.0, 0, 0, 0]] * 3, "bias": [0.0, 0.0, 0.0]}
    manifest = pipe.bundle.manifest
    bundle = replace(pipe.bundle, manifest=replace(manifest, pipeline={**manifest.pipeline, "preview": kept}))
    previewer = Previewer.of(bundle, pipe.engines)
    assert previewer.how == "linear map of the bundle"
    x = np.zeros((1, 4, 16, 16), np.float32)
    assert np.asarray(previewer(x, (64, 64))[0]).max() == 128
    monkeypatch.setattr("accel.pipeline.previews.previewer.is_tiny", lambda bundle: True)
    tiny = Previewer.of(bundle, pipe.engines)
    made = pipe(PROMPT, seed=1)
    assert tiny.how == "tiny VAE"
    shown = np.asarray(tiny(made.latents, (64, 64))[0])
    assert np.array_equal(shown, np.asarray(made.images[0]))


def test_a_callback_that_returns_false_stops(pipe):
    steps = []

    def stop(i, t, x):
        steps.append(i)
        return i < 1

    with pytest.raises(Stopped, match="after step 2 of 4") as stopped:
        pipe(PROMPT, seed=0, callback=stop)
    assert steps == [0, 1] and (stopped.value.done, stopped.value.steps) == (2, 4)
    assert pipe(PROMPT, seed=0, callback=lambda *_: None).images  # None goes on


@pytest.mark.parametrize(
    "call, words",
    [(dict(preview_every=0, preview_callback=print), "preview_every: 0"), (dict(preview_every=2), "nobody would see")],
)
def test_previews_that_cannot_be_are_refused(pipe, call, words):
    with pytest.raises(UserError, match=words):
        pipe(PROMPT, **call)


def test_a_bundle_without_an_encoder_says_so_before_it_runs(pipe):
    with pytest.raises(UserError, match="no vae_encoder"):
        pipe(PROMPT, image=Image.new("RGB", (64, 64)))


def test_a_map_in_a_manifest_is_checked(pipe):
    from accel.bundle import limits

    constants = dict(pipe.bundle.manifest.pipeline)
    good = {"factors": [[0.1, 0, 0, 0]] * 3, "bias": [0, 0.5, 0], "error": 0.1}
    assert list(limits.constants(constants | {"preview": good})) == []
    for wrong in (
        None,
        [],
        {},
        good | {"bias": [0, 0]},
        good | {"factors": [[0.1]] * 3},
        good | {"factors": 3},
        good | {"bias": [0, "x", 0]},
        good | {"bias": [0, float("nan"), 0]},
    ):
        assert "pipeline.preview" in next(limits.constants(constants | {"preview": wrong}))


def test_an_export_fits_the_map_to_the_decoder():
    from accel.export.preview_map import preview_map
    from accel.models.constants import pipeline_constants
    from accel.models.source import open_source
    from accel.models.source_networks import unet_inputs

    source = open_source("digits/tiny-1step")
    made = preview_map(source, unet_inputs(source, 77), pipeline_constants(source))["preview"]
    map_ = linear_map.LinearMap.from_dict(made)
    assert 0 < map_.error < 0.5 and np.shape(map_.factors) == (3, 4)
    with accel.load("digits/tiny-1step", "eager") as pipe:
        made = pipe(PROMPT, seed=1, output_type="np")
        small = (map_(made.latents)[0].transpose(1, 2, 0) + 1) / 2
        squares = made.images[0].reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
        assert np.corrcoef(small.ravel(), squares.ravel())[0, 1] > 0.85
