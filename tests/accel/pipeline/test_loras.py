"""LoRA at run time: the image that diffusers makes, on every engine, and back again to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import accel
from accel.cli import main
from accel.errors import UserError

CALL = dict(steps=4, guidance_scale=5.0, seed=3, height=64, width=64, output_type="np")


@pytest.fixture(scope="module")
def loras(smallest, tmp_path_factory):
    """Two files as diffusers writes them, for the UNet and the text encoder."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    made = []
    for seed, layers in enumerate((["to_q", "to_k", "to_v", "to_out.0"], ["to_k", "ff.net.2", "conv1"])):
        pipe, out = StableDiffusionPipeline.from_pretrained(smallest), tmp_path_factory.mktemp("lora")
        torch.manual_seed(seed)
        networks = {"unet": layers, "text_encoder": ["q_proj", "fc1"]}
        for name, wanted in networks.items():
            config = LoraConfig(r=4, lora_alpha=4, target_modules=wanted, init_lora_weights=False)
            getattr(pipe, name).add_adapter(config)
        pipe.save_lora_weights(
            out, **{f"{name}_lora_layers": get_peft_model_state_dict(getattr(pipe, name)) for name in networks}
        )
        made.append(out)
    return made


def theirs(smallest, files, scales, latents):
    """diffusers' image on our sampler's noise, with the adapters that it loads itself."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(smallest)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    for i, file in enumerate(files):
        pipe.load_lora_weights(str(file), adapter_name=f"lora{i}")
    if files:
        pipe.set_adapters([f"lora{i}" for i in range(len(files))], scales)
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=4, guidance_scale=5.0, height=64, width=64, output_type="np")
    return pipe("the cat", latents=torch.as_tensor(latents), **call).images


def draw(pipe, **more):
    return pipe("the cat", **CALL | more).images


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_a_to_b_to_a_is_the_image_of_diffusers_and_the_same_bits(engine, smallest, smallest_bundle, loras):
    if engine == "openvino":
        pytest.importorskip(engine)
    a, b = loras
    latents = np.random.default_rng(0).standard_normal((1, 4, 32, 32)).astype(np.float32)
    with accel.load(smallest_bundle, engine) as pipe:
        factor = pipe.bundle.manifest.pipeline["vae_scale"]
        latents = latents[:, :, : 64 // factor, : 64 // factor]
        own = draw(pipe, latents=latents)
        pipe.set_loras([f"{a}=0.7"])
        first = draw(pipe, latents=latents)
        pipe.set_loras([(a, 0.5), {"path": b, "scale": -1}])
        both = draw(pipe, latents=latents)
        pipe.set_loras([f"{a}=0.7"])
        again = draw(pipe, latents=latents)
        assert "=0.7" in repr(pipe)
        pipe.set_loras([])
        back = draw(pipe, latents=latents)
    assert np.array_equal(first, again) and np.array_equal(own, back)
    assert min(np.abs(x - y).max() for x, y in ((own, first), (own, both), (first, both))) > 1 / 255
    assert np.abs(first - theirs(smallest, [a], [0.7], latents)).max() < 1 / 255
    assert np.abs(both - theirs(smallest, [a, b], [0.5, -1.0], latents)).max() < 1 / 255
    with accel.load(smallest_bundle, engine, loras=[f"{a}=0.7"], low_memory=engine != "eager") as pipe:
        assert np.array_equal(draw(pipe, latents=latents), first)


def test_a_pipeline_folder_takes_them_too(smallest, smallest_bundle, loras):
    with accel.load(smallest, "eager", loras=loras[0]) as folder, accel.load(smallest_bundle, "eager") as bundle:
        bundle.set_loras(loras[0])
        call = dict(sampler="ddim")
        assert np.abs(draw(folder, **call) - draw(bundle, **call)).max() < 1e-4


def test_int8_follows_and_comes_back(tmp_path):
    from safetensors.torch import save_file

    from accel.models.lora.for_bundle import Bundle, Weights
    from accel.models.weight_files import stored

    bundle = Bundle.open("digits/4step-int8")
    record = bundle.component("unet")
    weights = Weights(stored(bundle.file(record.weights)), record)
    change = {
        f"unet.{layer}.diff": 0.5 * torch.as_tensor(weights.value(f"{layer}.weight")).contiguous()
        for layer in weights.layers
        if "attn2.to_v" in layer
    }
    save_file(change, tmp_path / "more.safetensors")
    with accel.load(bundle, "onnxruntime") as pipe:
        image = lambda: pipe("a handwritten seven", seed=1, output_type="np").images  # noqa: E731
        own = image()
        pipe.set_loras(tmp_path / "more.safetensors")
        assert np.abs(image() - own).max() > 1 / 255
        pipe.set_loras([])
        assert np.array_equal(image(), own)


def test_a_file_that_does_not_fit_changes_nothing(smallest_bundle, sdxl, loras, tmp_path):
    from safetensors.torch import save_file

    save_file({"unet.nowhere.diff": torch.ones(2, 2)}, tmp_path / "odd.safetensors")
    with accel.load(smallest_bundle, "onnxruntime", loras=loras[0]) as pipe:
        before = draw(pipe)
        for wrong, text in (("odd.safetensors", "no such layer"), ("missing.safetensors", "no such LoRA file")):
            with pytest.raises(UserError, match=text):
                pipe.set_loras([loras[1], tmp_path / wrong])
        assert np.array_equal(draw(pipe), before) and pipe.loras[0].path.parent == loras[0]


def test_where_one_engine_cannot_follow_none_does(smallest_bundle, loras, monkeypatch):
    from accel.engines.onnxruntime import OnnxRuntime

    with accel.load(smallest_bundle, "onnxruntime", loras=loras[0]) as pipe:
        before, real = draw(pipe), OnnxRuntime.set_weights

        def failing(engine, tensors):
            if engine.component.name == "unet":
                raise UserError("it cannot", "do something")
            real(engine, tensors)

        monkeypatch.setattr(OnnxRuntime, "set_weights", failing)
        with pytest.raises(UserError, match="it cannot"):
            pipe.set_loras(loras[1])
        monkeypatch.undo()
        assert np.array_equal(draw(pipe), before)


def test_an_engine_without_it_says_so(smallest_bundle):
    from accel.engines import Engine

    engine = accel.load_engine(smallest_bundle, "unet", "onnxruntime")
    with pytest.raises(UserError, match="cannot take other weights"):
        Engine.set_weights(engine, {})


def test_the_command_line(smallest_bundle, loras, tmp_path, capsys):
    out = tmp_path / "cat.png"
    command = ["run", str(smallest_bundle), "--prompt", "the cat", "--engine", "onnxruntime", "--json"]
    for more in ([], ["--lora", f"{loras[0]}=0.8", "--lora", str(loras[1])]):
        assert main([*command, *more, "--out", str(out), "--overwrite"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert len(said.get("loras", [])) == len(more) // 2
    assert main([*command, "--lora", f"{loras[0]}=much", "--out", str(out), "--overwrite"]) == 1
    assert "invalid LoRA scale" in capsys.readouterr().err
