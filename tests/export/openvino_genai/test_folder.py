"""OpenVINO GenAI draws a bundle's image from the folder that was written for it."""

from __future__ import annotations

import json

import numpy as np
import openvino
import openvino_genai
import pytest

import accel
from accel import UserError
from accel.bundle import Bundle
from accel.export.openvino_genai import describe, write
from accel.export.openvino_genai.refusals import SCHEDULERS, check
from accel.sampling import noise

PROMPT, SEED = "a handwritten seven", 7


def drawn(folder, bundle, draws, *, prompt=PROMPT, **call) -> np.ndarray:
    """GenAI's image [H, W, 3] in [0, 1] with given noise; its 8 bits are cut off, not rounded."""
    left = iter(draws)

    class Ours(openvino_genai.Generator):
        def randn_tensor(self, shape):
            return openvino.Tensor(np.ascontiguousarray(next(left), np.float32).reshape(tuple(shape)))

        def next(self):
            raise AssertionError("noise is drawn as whole tensors")

    pipe = openvino_genai.Text2ImagePipeline(str(folder), "CPU", INFERENCE_PRECISION_HINT="f32")
    record = json.loads((folder / "openvino_genai.json").read_text())
    call = {name: record[name] for name in ("num_inference_steps", "guidance_scale")} | call
    side = bundle.manifest.pipeline["native_size"]
    made = pipe.generate(prompt, height=side, width=side, generator=Ours(), **call)
    return (made.data[0].astype(np.float32) + 0.5) / 255


def noises(bundle, count) -> list[np.ndarray]:
    constants = bundle.manifest.pipeline
    side = constants["native_size"] // constants["vae_scale"]
    shape = constants["latent_channels"], side, side
    return [noise.normal([SEED], i, shape) for i in range(count)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The four-step int8 digits, which predict v under an LCMScheduler: GenAI itself ends in a crash there."""
    folder = tmp_path_factory.mktemp("genai") / "digits"
    bundle = Bundle.open("digits/4step-int8")
    return folder, bundle, write(bundle, folder)


def test_the_digits_come_out_although_genai_knows_no_v(digits):
    folder, bundle, record = digits
    ours = accel.load(bundle, engine="openvino", threads=1)(PROMPT, seed=SEED, output_type="np").images[0]
    image = drawn(folder, bundle, noises(bundle, 4))
    assert record["unet_predicts"] == "noise, from v" and np.abs(image - ours).max() < 4 / 255


def test_int8_weights_stay_int8(digits):
    folder, bundle, _ = digits
    stored = bundle.file("unet/model.safetensors").stat().st_size
    assert (folder / "unet/openvino_model.bin").stat().st_size < 1.1 * stored


def test_what_is_written_says_the_steps_and_is_ours(digits):
    folder, bundle, record = digits
    assert (record["num_inference_steps"], record["guidance_scale"]) == (4, 0.0)
    assert "num_inference_steps=4, guidance_scale=0" in describe(folder, record)
    assert "num_inference_steps=4, guidance_scale=0" in (folder / "README.md").read_text()
    assert set(record["files"]) >= {"unet/openvino_model.bin", "tokenizer/openvino_tokenizer.xml"}
    with pytest.raises(UserError, match="exists already"):
        write(bundle, folder)


def test_a_guided_model_with_another_scheduler_draws_the_same_image(guided, tmp_path):
    bundle = Bundle.open(guided)
    write(bundle, tmp_path / "genai")
    draws = noises(bundle, 1)
    with accel.load(bundle, engine="openvino", threads=1) as pipe:
        ours = pipe("a cat", negative_prompt="a dog", latents=draws[0], output_type="np").images[0]
    image = drawn(tmp_path / "genai", bundle, draws, prompt="a cat", negative_prompt="a dog")
    assert np.abs(image - ours).max() < 1 / 255


@pytest.fixture(scope="module")
def guided(smallest, tmp_path_factory):
    """The smallest pipeline with DDIM in its folder, guided."""
    import shutil

    from accel.export.pipeline import export_pipeline

    model = shutil.copytree(smallest, tmp_path_factory.mktemp("model") / "ddim")
    config = json.loads((model / "scheduler/scheduler_config.json").read_text())
    changed = config | {"_class_name": "DDIMScheduler", "clip_sample": False}
    (model / "scheduler/scheduler_config.json").write_text(json.dumps(changed))
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    sampler = {"name": "ddim", "steps": 5, "guidance": 4.0}
    out = tmp_path_factory.mktemp("bundle") / "ddim"
    export_pipeline(model, out, profile="batch=1-4,size=32-64", sampler=sampler)
    return out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler"}, "has no DPMSolverMultistepScheduler"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas = True"),
        ({"clip_sample": True}, "clip_sample = True"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule = 'squaredcos_cap_v2'"),
        ({"prediction_type": "sample"}, "prediction_type 'sample'"),
    ],
)
def test_what_genai_would_draw_otherwise_is_refused(guided, tmp_path, change, words, monkeypatch):
    bundle = Bundle.open(guided)
    config = json.loads(bundle.file("scheduler/scheduler_config.json").read_text()) | change
    monkeypatch.setattr("accel.export.openvino_genai.refusals.read_json", lambda *_: config)
    with pytest.raises(UserError, match=words) as refused:
        check(bundle)
    assert "DDIMScheduler" in refused.value.fix


def test_every_scheduler_that_it_reads_is_one_of_diffusers():
    import diffusers

    assert all(hasattr(diffusers, name) for name in SCHEDULERS)


def test_one_text_at_once_is_too_few_for_guidance(smallest, tmp_path, monkeypatch, guided):
    from dataclasses import replace

    bundle = Bundle.open(guided)
    text = bundle.component("text_encoder")
    one = replace(text, dims={"images": replace(text.dims["images"], max=1, opt=1)})
    narrow = replace(
        bundle, manifest=replace(bundle.manifest, components={**bundle.manifest.components, "text_encoder": one})
    )
    with pytest.raises(UserError, match="encodes prompt and negative prompt together"):
        check(narrow)


def test_sdxl_is_written_with_the_pooled_text_first(sdxl_bundle, tmp_path, monkeypatch):
    bundle = Bundle.open(sdxl_bundle)
    config = json.loads(bundle.file("scheduler/scheduler_config.json").read_text())
    if config["_class_name"] not in SCHEDULERS:
        pytest.fail(config["_class_name"])
    write(bundle, tmp_path / "genai")
    model = openvino.Core().read_model(tmp_path / "genai/text_encoder_2/openvino_model.xml")
    assert "text_embeds" in model.outputs[0].get_names()
    draws = noises(bundle, 1)
    steps = 3
    with accel.load(bundle, engine="openvino", threads=1) as pipe:
        name = {"EulerDiscreteScheduler": "euler", "DDIMScheduler": "ddim", "PNDMScheduler": "pndm"}[
            config["_class_name"]
        ]
        ours = pipe("a cat", latents=draws[0], steps=steps, sampler=name, output_type="np").images[0]
    image = drawn(tmp_path / "genai", bundle, draws, prompt="a cat", num_inference_steps=steps)
    assert np.abs(image - ours).max() < 1 / 255
