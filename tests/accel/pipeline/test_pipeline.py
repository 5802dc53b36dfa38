"""The whole pipeline against diffusers, and what a caller may rely on."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import accel
from accel.errors import Notice, UserError
from accel.sampling import noise

ENGINES = ("eager", "onnxruntime", "openvino")
ONE_STEP_OF_A_PIXEL = 1 / 255


@pytest.fixture(scope="module")
def pipelines(sd15_bundle):
    loaded = {}

    def get(engine: str):
        if engine == "openvino":
            pytest.importorskip("openvino")
        if engine not in loaded:
            loaded[engine] = accel.load(sd15_bundle, engine=engine)
        return loaded[engine]

    return get


@pytest.fixture(scope="module")
def reference(sd15):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(sd15)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(seeds, height=16, width=16):
    return torch.from_numpy(noise.normal(seeds, 0, (4, height, width)))


@pytest.mark.parametrize("engine", ENGINES)
def test_guided_images_equal_diffusers(engine, pipelines, reference):
    from diffusers import DPMSolverMultistepScheduler

    reference.scheduler = DPMSolverMultistepScheduler.from_config(reference.scheduler.config)
    prompts, negatives = ["the cat", "a dog"], ["the dog"] * 2
    expected = reference(
        prompts,
        negative_prompt=negatives,
        num_inference_steps=6,
        guidance_scale=6.0,
        height=64,
        width=128,
        latents=latents_of([7, 8], 16, 32),
        output_type="np",
    ).images
    actual = pipelines(engine)(
        prompts, negatives, steps=6, guidance_scale=6.0, height=64, width=128, seed=7, output_type="np"
    ).images
    assert expected.std() > 0.01
    assert np.abs(actual - expected).max() < ONE_STEP_OF_A_PIXEL


@pytest.mark.parametrize(("sampler", "scheduler"), [("ddim", "DDIMScheduler"), ("euler", "EulerDiscreteScheduler")])
def test_other_samplers_equal_diffusers(sampler, scheduler, pipelines, reference):
    import diffusers

    options = {"clip_sample": False} if sampler == "ddim" else {}
    reference.scheduler = getattr(diffusers, scheduler).from_config(reference.scheduler.config, **options)
    expected = reference(
        "the cat", num_inference_steps=5, guidance_scale=4.0, latents=latents_of([1]), output_type="np"
    ).images
    actual = pipelines("onnxruntime")(
        "the cat", sampler=sampler, steps=5, guidance_scale=4.0, seed=1, output_type="np"
    ).images
    assert np.abs(actual - expected).max() < ONE_STEP_OF_A_PIXEL


@pytest.mark.parametrize(
    ("scheduler", "changes", "call"),
    [
        ("PNDMScheduler", {}, {"sampler": "pndm"}),
        ("HeunDiscreteScheduler", {}, {"sampler": "heun"}),
        ("UniPCMultistepScheduler", {}, {"sampler": "unipc"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"sampler": "euler", "sigmas": "karras"}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, {"sampler": "dpmpp_2m", "sigmas": "lu"}),
        ("TCDScheduler", {}, {"sampler": "tcd"}),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, {"sampler": "ddim", "timestep_spacing": "trailing"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_samplers_and_their_options_equal_diffusers(scheduler, changes, call, pipelines, reference, sd15):
    import diffusers

    own = diffusers.PNDMScheduler.from_pretrained(sd15, subfolder="scheduler").config
    clips = {"clip_sample": False} if scheduler == "DDIMScheduler" else {}
    reference.scheduler = getattr(diffusers, scheduler).from_config(own, **changes, **clips)
    how = dict(guidance_scale=1.0, output_type="np")
    expected = reference("the cat", num_inference_steps=4, latents=latents_of([1]), **how).images
    reference.scheduler = diffusers.PNDMScheduler.from_config(own)  # as the other tests found it
    actual = pipelines("onnxruntime")("the cat", steps=4, seed=1, **call, **how).images
    assert np.abs(actual - expected).max() < ONE_STEP_OF_A_PIXEL


@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], [999, 499], [399]])
def test_few_step_students_equal_lcm_scheduler_without_guidance(timesteps, pipelines, reference, monkeypatch):
    from diffusers import LCMScheduler
    from diffusers.schedulers import scheduling_lcm

    draws = iter(range(1, 10))
    monkeypatch.setattr(
        scheduling_lcm, "randn_tensor", lambda shape, **_: torch.from_numpy(noise.normal([3], next(draws), shape[1:]))
    )
    reference.scheduler = LCMScheduler.from_config(reference.scheduler.config)
    expected = reference(
        "the cat",
        timesteps=timesteps,
        num_inference_steps=len(timesteps),
        guidance_scale=0.0,
        latents=latents_of([3]),
        output_type="np",
    ).images
    actual = pipelines("onnxruntime")(
        "the cat", sampler="dmd2", timesteps=timesteps, guidance_scale=0.0, seed=3, output_type="np"
    ).images
    assert np.abs(actual - expected).max() < ONE_STEP_OF_A_PIXEL


def test_pil_images_are_rounded_as_diffusers_does(pipelines, reference):
    from diffusers import DPMSolverMultistepScheduler

    reference.scheduler = DPMSolverMultistepScheduler.from_config(reference.scheduler.config)
    (expected,) = reference("a dog", num_inference_steps=3, guidance_scale=3.0, latents=latents_of([2])).images
    (actual,) = pipelines("eager")("a dog", steps=3, guidance_scale=3.0, seed=2).images
    assert np.abs(np.asarray(actual, int) - np.asarray(expected, int)).max() <= 1


def test_an_image_does_not_depend_on_its_batch(pipelines):
    pipe = pipelines("onnxruntime")
    together = pipe(["the cat", "a dog"], num_images_per_prompt=3, seed=10, output_type="np", steps=2)
    assert together.seeds == [10, 11, 12, 13, 14, 15]  # more images than the profile's batch of 4: made in parts
    alone = pipe("a dog", seed=14, output_type="np", steps=2).images[0]
    assert np.abs(together.images[4] - alone).max() < ONE_STEP_OF_A_PIXEL
    assert np.abs(together.images[3] - together.images[4]).max() > ONE_STEP_OF_A_PIXEL


def test_mixed_engines_give_the_same_image(sd15_bundle, pipelines):
    chosen = {"text_encoder": "onnxruntime", "unet": "eager", "vae_decoder": "onnxruntime"}
    mixed = accel.load(sd15_bundle, engine=chosen)
    a = mixed("the cat", steps=2, seed=0, output_type="np").images
    b = pipelines("onnxruntime")("the cat", steps=2, seed=0, output_type="np").images
    assert np.abs(a - b).max() < ONE_STEP_OF_A_PIXEL


def test_bound_outputs_never_overwrite_what_the_sampler_still_needs(sd15_bundle, pipelines):
    """optimum binds the UNet's output over its input, which is the latents themselves when guidance is off."""
    bound = accel.load(sd15_bundle, engine="onnxruntime", io_binding=True)
    assert bound.engines["unet"].native == "torch"
    for sampler in ("dmd2", "ddim"):
        options = dict(sampler=sampler, steps=4, guidance_scale=0.0, output_type="np", seed=4)
        expected = pipelines("onnxruntime")("the cat", **options).images
        assert np.abs(bound("the cat", **options).images - expected).max() < ONE_STEP_OF_A_PIXEL


def test_the_bundles_own_sampler_is_the_default(pipelines):
    calls = []
    pipelines("onnxruntime")("the cat", callback=lambda i, t, x: calls.append((i, t, x.shape)))
    assert [i for i, _, _ in calls] == [0, 1, 2, 3]  # the fixture's manifest says 4 steps
    assert calls[0][2] == (1, 4, 16, 16)


def test_output_types_and_timings(pipelines):
    pipe = pipelines("onnxruntime")
    result = pipe("the cat", output_type="latent", steps=1)
    assert result.images.shape == (1, 4, 16, 16) and result.images.dtype == np.float32
    result = pipe("the cat", steps=1)
    assert result.images[0].size == (64, 64)
    parts = sum(result.seconds[name] for name in ("text_encoder", "unet", "vae_decoder"))
    assert 0 < parts <= result.seconds["total"] * 1.0001


def test_own_latents_and_noise_are_used(pipelines):
    pipe = pipelines("onnxruntime")
    mine = noise.normal([9], 0, (4, 16, 16))
    common = dict(sampler="dmd2", steps=2, guidance_scale=0, output_type="np")
    given = pipe("the cat", latents=mine, renoise=lambda i: noise.normal([9], i + 1, (4, 16, 16)), **common)
    assert np.array_equal(given.images, pipe("the cat", seed=9, **common).images)


def test_a_long_prompt_is_cut_audibly(pipelines):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipelines("onnxruntime")("the cat " * 60, steps=1)
    (notice,) = [w for w in caught if issubclass(w.category, Notice)]
    assert "ignored" in str(notice.message) and "cat" in str(notice.message)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(height=72), "height 72"),
        (dict(width=1024), "width 1024"),
        (dict(steps=0), "0"),
        (dict(guidance_scale=float("nan")), "nan"),
        (dict(guidance_scale=-1), "-1"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt"),
        (dict(seed=-1), "-1"),
        (dict(seed=[1, 2]), "seed"),
        (dict(sampler="plms"), "plms"),
        (dict(output_type="jpeg"), "jpeg"),
        (dict(latents=np.zeros((2, 4, 16, 16), np.float32)), "2 latents"),
        (dict(latents=np.zeros((1, 3, 16, 16), np.float32)), "3"),
        (dict(negative_prompt=["a", "b"]), "2 negative prompts"),
    ],
)
def test_wrong_arguments_are_named(arguments, named, pipelines):
    with pytest.raises(UserError) as error:
        pipelines("onnxruntime")("the cat", **arguments)
    assert named in str(error.value) and error.value.fix


def test_no_prompt_is_an_error(pipelines):
    with pytest.raises(UserError, match="no prompt"):
        pipelines("onnxruntime")([])
