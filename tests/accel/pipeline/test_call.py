"""How a pipeline is called: diffusers' names beside ours, one sentence for every wrong value, one place for memory."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch

import accel
from accel.bundle import Bundle
from accel.errors import Notice, UserError
from accel.sampling.samplers import SAMPLERS

PROMPT = "a handwritten seven"


@pytest.fixture(scope="module")
def pipe():
    return accel.load("digits/4step", "eager")


@pytest.fixture(scope="module")
def reference(small):
    from diffusers import StableDiffusionPipeline

    made = StableDiffusionPipeline.from_pretrained(small)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def ours(small):
    return accel.load(small, "eager")


def drawn(pipe, **arguments):
    return pipe(PROMPT, **({"seed": 3, "output_type": "np"} | arguments)).images


# --------------------------------------------------------------------------------------------------- diffusers' names


def test_diffusers_names_mean_the_same(pipe):
    expected = drawn(pipe, sampler="ddim", steps=3, guidance_scale=2.0)
    assert np.array_equal(drawn(pipe, sampler="ddim", num_inference_steps=3, guidance_scale=2.0, eta=0.0), expected)
    noisy = drawn(pipe, sampler="ddim", num_inference_steps=3, guidance_scale=2.0, eta=1.0)
    assert np.abs(noisy - expected).max() > 0.01
    neutral = dict(prompt_embeds=None, clip_skip=None, guidance_rescale=0.0, cross_attention_kwargs=None, eta=0.0)
    assert np.array_equal(drawn(pipe, **neutral), drawn(pipe))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dmd2", "ddim"])
@pytest.mark.parametrize("single", [True, False])
def test_a_generator_draws_what_it_draws_in_diffusers(sampler, single, ours, reference):
    import diffusers

    more = {"clip_sample": False} if sampler == "ddim" else {}
    reference.scheduler = getattr(diffusers, SAMPLERS[sampler].scheduler).from_config(
        reference.scheduler.config, **more
    )
    few = dict(timesteps=[999, 749, 499], num_inference_steps=3) if sampler == "dmd2" else dict(num_inference_steps=3)
    options = few | dict(guidance_scale=0.0 if sampler == "dmd2" else 4.0, output_type="pt", height=64, width=64)
    options |= {"eta": 0.7} if sampler == "ddim" else {}

    def generator():
        return torch.Generator().manual_seed(5) if single else [torch.Generator().manual_seed(i) for i in range(2)]

    expected = reference(["the cat", "a dog"], generator=generator(), **options).images
    source = generator()
    made = ours(["the cat", "a dog"], sampler=sampler, generator=source, **options)
    assert made.images.shape == expected.shape == (2, 3, 64, 64) and made.images.dtype == torch.float32
    assert (made.images - expected).abs().max() < 1 / 255 and expected.std() > 0.01
    assert made.seeds == [] and made.seed is None
    again = ours(["the cat", "a dog"], sampler=sampler, generator=source, **options).images
    assert (again - made.images).abs().max() > 0.01, "a generator goes on"


def test_a_generator_gives_the_same_noise_however_the_batch_is_cut(ours):
    from accel.pipeline import request

    options = dict(sampler="dmd2", steps=3, guidance_scale=0.0, height=32, width=32, output_type="np")
    expected = ours(["the cat"] * 3, generator=torch.Generator().manual_seed(1), **options).images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "images_per_run", lambda *_: 2)
        cut = ours(["the cat"] * 3, generator=torch.Generator().manual_seed(1), **options).images
    assert np.abs(cut - expected).max() < 1e-4


def test_callback_on_step_end_sees_and_changes_the_latents(pipe):
    seen = []

    def callback(pipeline, i, t, tensors):
        assert pipeline is pipe and set(tensors) == {"latents"} and torch.is_tensor(tensors["latents"])
        seen.append((i, t, tuple(tensors["latents"].shape)))
        return {"latents": tensors["latents"] * 0} if i == 1 else tensors

    changed = drawn(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"])
    assert [i for i, _, _ in seen] == [0, 1, 2, 3] and seen[0][1:] == (999, (1, 4, 16, 16))
    assert np.abs(changed - drawn(pipe)).max() > 0.01
    assert np.array_equal(drawn(pipe, callback_on_step_end=lambda *_: {}), drawn(pipe))
    for wrong in (lambda *_: 3, lambda *_: {"latents": torch.zeros(2)}):
        with pytest.raises(UserError, match="callback_on_step_end returned") as error:
            drawn(pipe, callback_on_step_end=wrong)
        assert error.value.fix
    with pytest.raises(UserError, match="latents alone, not prompt_embeds"):
        drawn(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_image_to_image_counts_steps_from_zero(ours):
    seen = []
    image = torch.zeros(3, 64, 64)  # diffusers' layout
    callback = lambda p, i, t, kwargs: seen.append(i) or kwargs  # noqa: E731
    how = dict(strength=0.5, steps=4, sampler="ddim", seed=0, output_type="np")
    found = ours("the cat", image=image, callback_on_step_end=callback, **how)
    assert seen == [0, 1]
    same = ours("the cat", image=np.zeros((64, 64, 3)), **how)
    assert np.array_equal(found.images, same.images)


def test_return_dict_false_is_diffusers_tuple(pipe):
    images, unsafe = pipe(PROMPT, seed=0, return_dict=False)
    assert images[0].size == (64, 64) and unsafe is None


def test_no_seed_is_a_new_image_that_can_be_made_again(pipe):
    one, two = pipe(PROMPT, output_type="np"), pipe(PROMPT, output_type="np")
    assert one.seeds != two.seeds and np.abs(one.images - two.images).max() > 0.01
    assert np.array_equal(pipe(PROMPT, seed=one.seed, output_type="np").images, one.images)
    assert f"seed {one.seed}" in repr(one)


def test_to_is_harmless_where_nothing_moves_and_refused_where_it_would(pipe):
    assert pipe.to("cpu") is pipe.to(torch.device("cpu"), torch.float32) is pipe.to(dtype=torch.float32) is pipe
    for target in ("cuda", torch.device("cuda", 0), 0, torch.float16):
        with pytest.raises(UserError, match="this pipeline cannot be moved to") as error:
            pipe.to(target)
        assert "accel.load(BUNDLE, d" in error.value.fix


# --------------------------------------------------------------------------------------------------------- wrong values

NAN = torch.full((1, 4, 16, 16), float("nan"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(prompt=None), "invalid prompt: None"),
        (dict(prompt=3), "invalid prompt: 3"),
        (dict(prompt=[None]), "invalid prompt: [None]"),
        (dict(prompt=[["a"]]), "invalid prompt"),
        (dict(prompt=b"seven"), "invalid prompt"),
        (dict(seed="a"), "invalid seed: 'a'"),
        (dict(seed=1.5), "invalid seed: 1.5"),
        (dict(seed=True), "invalid seed: True"),
        (dict(seed=[1, "b"]), "invalid seed"),
        (dict(height="64"), "invalid height: '64'"),
        (dict(width=64.0), "invalid width: 64.0"),
        (dict(steps="4"), "invalid steps: '4'"),
        (dict(steps=2.0), "invalid steps: 2.0"),
        (dict(num_inference_steps="4"), "invalid steps: '4'"),
        (dict(timesteps=3), "invalid timesteps: 3"),
        (dict(timesteps=["a"]), "invalid timesteps"),
        (dict(sampler=4), "invalid sampler: 4"),
        (dict(guidance_scale="7"), "invalid guidance_scale: '7'"),
        (dict(negative_prompt=4), "invalid negative_prompt: 4"),
        (dict(num_images_per_prompt=None), "invalid num_images_per_prompt: None"),
        (dict(num_images_per_prompt=1.0), "invalid num_images_per_prompt: 1.0"),
        (dict(image=3), "invalid image: 3"),
        (dict(image=np.zeros((64, 64, 3)), strength="a"), "invalid strength: 'a'"),
        (dict(mask_image={}), "invalid mask_image: {}"),
        (dict(control_scale=None), "invalid control_scale: None"),
        (dict(control_end="all"), "invalid control_end: 'all'"),
        (dict(original_size=512), "invalid original_size: 512"),
        (dict(crop=(1,)), "invalid crop: (1,)"),
        (dict(target_size=(1, 2, 3)), "invalid target_size"),
        (dict(latents=[1.0]), "invalid latents: [1.0]"),
        (dict(renoise=1), "invalid renoise: 1"),
        (dict(output_type=None), "invalid output_type: None"),
        (dict(output_type=np.zeros(3)), "invalid output_type: ndarray of shape (3,), float64"),
        (dict(callback="print"), "invalid callback: 'print'"),
        (dict(progress="yes"), "invalid progress: 'yes'"),
        (dict(prompt_weights=1), "invalid prompt_weights: 1"),
        (dict(generator=3), "invalid generator: 3"),
        (dict(generator=np.random.default_rng(0)), "invalid generator"),
        (dict(generator=[torch.Generator()] * 2), "2 generators for 1 images"),
        (dict(return_dict="no"), "invalid return_dict: 'no'"),
        (dict(callback_on_step_end=1), "invalid callback_on_step_end: 1"),
        (dict(seed=1, generator=torch.Generator()), "seed and generator are both given"),
        (dict(steps=1, num_inference_steps=2), "num_inference_steps and steps are two names"),
        (dict(steps=3, timesteps=[9, 5]), "steps = 3, and 2 timesteps"),
        (dict(stepz=3), "unknown argument 'stepz'"),
        (dict(eta=0.5), "sampler dmd2 has no option eta"),
        (dict(eta="a", sampler="ddim"), "invalid eta: 'a'"),
        (dict(prompt_embeds=torch.zeros(1, 77, 64)), "only diffusers' own"),
        (dict(clip_skip=9), "invalid clip_skip: 9"),
        (dict(latents=NAN), "NaN"),
        (dict(latents=torch.zeros(1, 4, 16, 16, dtype=torch.int64)), "latents of int64"),
        (dict(latents=np.zeros((1, 3, 16, 16), np.float32)), "(1, 3, 16, 16)"),
        (dict(latents=np.zeros((4, 16, 16), np.float32)), "(4, 16, 16)"),
        (dict(latents=np.zeros((1, 4, 16, 16), np.float32), height=128), "leave height out"),
        (dict(image=np.zeros((2, 64, 64, 3))), "2 images for 1"),
        (dict(image=[np.zeros((1, 64, 64, 3, 1))]), "(1, 64, 64, 3, 1)"),
    ],
)
def test_a_wrong_value_is_one_sentence(arguments, named, pipe):
    with pytest.raises(UserError) as error:
        pipe(**({"prompt": PROMPT} | arguments))
    assert named in str(error.value) and error.value.fix
    assert "--height" not in str(error.value) and len(error.value.message.splitlines()) == 1


def test_what_has_no_effect_or_is_rounded_is_said(pipe):
    with pytest.warns(Notice, match="negative prompt has no effect, because guidance_scale is 0"):
        drawn(pipe, negative_prompt="a blob", guidance_scale=0)
    with pytest.warns(Notice, match="float64"):
        drawn(pipe, latents=np.zeros((1, 4, 16, 16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        drawn(pipe, negative_prompt="")
        drawn(pipe, negative_prompt="a blob", guidance_scale=3.0, sampler="ddim", steps=1)
        half = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert np.array_equal(drawn(pipe, latents=half), drawn(pipe, latents=half.float().numpy()))


@pytest.mark.parametrize(
    ("bundle", "arguments", "said"),
    [
        ("digits/4step-int8", {}, False),
        ("digits/4step-int8", {"steps": 2}, True),
        ("digits/4step-int8", {"sampler": "lcm", "steps": 4}, True),
        ("digits/4step", {"steps": 2}, False),
    ],
)
def test_other_steps_than_int8_ranges_were_calibrated_for_are_said(bundle, arguments, said):
    pipe = accel.load(bundle, "onnxruntime" if "int8" in bundle else "eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe(PROMPT, seed=0, output_type="latent", **arguments)
    texts = [str(entry.message) for entry in caught if "were calibrated on dmd2 in 4 steps" in str(entry.message)]
    assert len(texts) == said
    if said:
        name, steps = arguments.get("sampler", "dmd2"), arguments["steps"]
        assert f"--sampler {name} --steps {steps}" in texts[0]


def test_nan_of_float32_networks_is_not_blamed_on_the_precision(pipe):
    def spoil(pipeline, i, t, tensors):
        return {"latents": tensors["latents"] * float("nan")}

    with pytest.raises(UserError, match="NaN or infinite \\(unet: torch") as error:
        drawn(pipe, callback_on_step_end=spoil)
    assert "export with" not in error.value.fix


# ------------------------------------------------------------------------------------------------------------- lifetime


def test_with_closes_and_a_closed_one_says_so(small):
    with accel.load(small, "eager") as pipe:
        unet = pipe.engines["unet"]
    pipe.close()
    assert pipe.closed and unet.closed and "(closed)" in repr(pipe)
    for use in (lambda: pipe("the cat"), lambda: unet(), lambda: pipe.engines["unet"], lambda: pipe.__enter__()):
        with pytest.raises(UserError, match="is closed and cannot be used") as error:
            use()
        assert "accel.load" in error.value.fix
    with accel.load_engine("digits/4step-int8", "vae_decoder", "onnxruntime") as engine:
        assert "vae_decoder on onnxruntime" in repr(engine)
    with pytest.raises(UserError, match="this engine is closed"):
        engine(latent_sample=np.zeros((1, 4, 16, 16), np.float32))


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_copies_are_refused_with_the_way_out(way, pipe):
    for held, load in ((pipe, "accel.load(BUNDLE)"), (pipe.engines["unet"], "accel.load_engine(BUNDLE")):
        with pytest.raises(UserError, match="cannot be copied or pickled") as error:
            way(held)
        assert load in error.value.fix


# --------------------------------------------------------------------------------------------------------------- reprs


def test_reprs_are_short_and_say_what_counts(pipe):
    assert len(repr(pipe).splitlines()) <= 8 and "digits/4step" in repr(pipe) and "dmd2 in 4 steps" in repr(pipe)
    assert "unet" in repr(pipe) and "torch" in repr(pipe) and "64 x 64 px (4 to 8192" in repr(pipe.bundle)
    html = pipe._repr_html_()
    assert html.count("<tr>") == 4 and "dmd2 in 4 steps" in html
    bundle = Bundle.open("digits/4step-int8")
    assert len(repr(bundle)) < 300 and "vae_decoder" in repr(bundle) and "sha256" not in repr(bundle)
    assert "sample float32 [batch, 4" in repr(pipe.engines["unet"])


@pytest.mark.parametrize(("kind", "shown"), [("pil", 2), ("np", 2), ("pt", 2), ("latent", 0)])
def test_an_output_shows_its_images(kind, shown, pipe):
    made = pipe(PROMPT, seed=[4, 9], num_images_per_prompt=2, output_type=kind)
    what = "2 latents of 16 x 16, " if kind == "latent" else "2 images of 64 x 64 px, "
    assert f"{what}seeds 4, 9" in repr(made) and "array(" not in repr(made) and len(repr(made)) < 120
    assert made._repr_html_().count('<img src="data:image/png;base64,') == shown
