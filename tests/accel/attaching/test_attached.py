"""Compiled networks inside somebody else's diffusers pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import accel
from accel.errors import UserError


@pytest.fixture
def pipe(sd15):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(sd15)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def smallest_pipe(smallest):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(smallest)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe, **options):
    generator = torch.Generator().manual_seed(3)
    options = dict(num_inference_steps=4, guidance_scale=5.0, height=64, width=64) | options
    return pipe("the cat", generator=generator, output_type="np", **options).images


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_the_image_stays_the_same(engine, guidance, pipe, sd15_bundle):
    pytest.importorskip(engine)
    before = image(pipe, guidance_scale=guidance)
    with accel.attach(pipe, sd15_bundle, engine=engine) as attached:
        assert set(attached.engines) == {"text_encoder", "unet", "vae_decoder"}
        assert np.abs(image(pipe, guidance_scale=guidance) - before).max() < 1 / 255


def test_the_engine_really_does_the_work(pipe, sd15_bundle):
    with accel.attach(pipe, sd15_bundle, engine="onnxruntime") as attached:
        calls = []
        unet = attached.engines["unet"]
        run = unet.run
        unet.run = lambda feeds: calls.append(1) or run(feeds)
        image(pipe, num_inference_steps=3)
        assert len(calls) >= 3


def test_detach_restores_the_pipeline_exactly(pipe, sd15_bundle):
    before, parts = image(pipe), (pipe.unet, pipe.vae, pipe.text_encoder)
    attached = accel.attach(pipe, sd15_bundle, engine="onnxruntime")
    attached.detach()
    assert (pipe.unet, pipe.vae, pipe.text_encoder) == parts
    assert np.array_equal(image(pipe), before)


def test_another_model_is_refused_and_nothing_changes(sd15_tiny, sd15_bundle):
    from diffusers import StableDiffusionPipeline

    other = StableDiffusionPipeline.from_pretrained(sd15_tiny)
    unet = other.unet
    with pytest.raises(UserError, match="different models"):
        accel.attach(other, sd15_bundle, engine="onnxruntime")
    assert other.unet is unet


def test_features_the_graph_does_not_have_are_refused(pipe, sd15_bundle):
    with accel.attach(pipe, sd15_bundle, engine="onnxruntime"):
        with pytest.raises(UserError, match="hidden states"):
            image(pipe, clip_skip=1)
        with pytest.raises(UserError, match="cross_attention_kwargs"):
            pipe("the cat", num_inference_steps=1, cross_attention_kwargs={"gligen": {"boxes": 1}})


def test_a_second_attachment_is_refused_with_the_way_out(smallest_pipe, smallest_bundle):
    from diffusers import StableDiffusionImg2ImgPipeline

    originals = (smallest_pipe.unet, smallest_pipe.vae, smallest_pipe.text_encoder)
    attached = accel.attach(smallest_pipe, smallest_bundle, engine="onnxruntime")
    shared = StableDiffusionImg2ImgPipeline(**smallest_pipe.components, requires_safety_checker=False)
    for again in (smallest_pipe, shared):
        with pytest.raises(UserError, match="attached to a bundle already") as error:
            accel.attach(again, smallest_bundle, engine="onnxruntime")
        assert "detach()" in error.value.fix
    attached.detach()
    with accel.attach(smallest_pipe, smallest_bundle, engine="onnxruntime") as second:
        attached.detach()  # long over: it must not undo the second
        assert smallest_pipe.unet is not originals[0] and "unet" in repr(second)
    assert (smallest_pipe.unet, smallest_pipe.vae, smallest_pipe.text_encoder) == originals
    assert "detached" in repr(second) and all(engine.closed for engine in second.engines.values())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_other_weights_of_the_same_config_are_refused(part, size, smallest_pipe, smallest_bundle):
    with torch.no_grad():
        for weight in getattr(smallest_pipe, part).parameters():
            weight.mul_(1 + size)
    with pytest.raises(UserError, match="different weights") as error:
        accel.attach(smallest_pipe, smallest_bundle, engine="onnxruntime")
    assert "exported from this pipeline" in error.value.fix
    assert isinstance(smallest_pipe.unet, torch.nn.Module) and "to" not in smallest_pipe.__dict__


def test_weights_of_another_dtype_are_the_same_weights(smallest_pipe, smallest_bundle):
    with accel.attach(smallest_pipe.to(torch.float16), smallest_bundle, engine="onnxruntime"):
        pass


@pytest.fixture
def lora(smallest, tmp_path):
    """A LoRA as diffusers writes it."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = StableDiffusionPipeline.from_pretrained(smallest)
    torch.manual_seed(2)
    for part, layers in ((pipe.unet, ["to_q", "to_v", "conv1"]), (pipe.text_encoder, ["q_proj"])):
        part.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False))
    states = [get_peft_model_state_dict(part) for part in (pipe.unet, pipe.text_encoder)]
    pipe.save_lora_weights(tmp_path / "lora", unet_lora_layers=states[0], text_encoder_lora_layers=states[1])
    return tmp_path / "lora"


@pytest.mark.parametrize("engine", ["onnxruntime", "eager"])
def test_adapters_are_followed_whenever_they_change(engine, smallest_pipe, smallest_bundle, lora):
    pipe = smallest_pipe
    same = lambda one, two: np.abs(one - two).max() < 1 / 255  # noqa: E731
    plain = image(pipe)
    pipe.load_lora_weights(lora, adapter_name="it")
    full = image(pipe)
    pipe.set_adapters(["it"], [0.4])
    weak = image(pipe)
    assert not same(plain, full) and not same(weak, full) and not same(plain, weak)
    with accel.attach(pipe, smallest_bundle, engine=engine):
        assert same(image(pipe), weak), "active when it was attached"
        pipe.set_adapters(["it"], [1.0])
        assert same(image(pipe), full)
        pipe.disable_lora()
        off = image(pipe)
        assert same(off, plain)
        pipe.enable_lora()
        assert same(image(pipe), full)
        pipe.unload_lora_weights()
        assert np.array_equal(image(pipe), off), "the same bits"
        pipe.load_lora_weights(lora)
        assert same(image(pipe), full)
        assert "CompiledUNet" in type(pipe.unet).__name__
    assert same(image(pipe), full) and "load_lora_weights" not in pipe.__dict__


def test_what_cannot_be_followed_raises_with_the_way_out(smallest_pipe, smallest_bundle, lora):
    pipe = smallest_pipe
    with accel.attach(pipe, smallest_bundle, engine="onnxruntime"):
        calls = {
            "fuse_lora": lambda: pipe.fuse_lora(),
            "enable_freeu": lambda: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
            "load_textual_inversion": lambda: pipe.load_textual_inversion({"<x>": torch.randn(1, 32)}),
            "enable_model_cpu_offload": lambda: pipe.enable_model_cpu_offload(),
            "set_attn_processor": lambda: pipe.unet.set_attn_processor(None),
            "load_lora_adapter": lambda: pipe.unet.load_lora_adapter(lora),
            "add_adapter": lambda: pipe.text_encoder.add_adapter(None),
        }
        for name, call in calls.items():
            with pytest.raises(UserError, match=f"{name} would not reach") as error:
                call()
            assert error.value.fix
        with pytest.raises((OSError, ValueError)):
            pipe.load_lora_weights("not/there")
        assert type(pipe.unet).__name__ == "CompiledUNet"


def test_where_the_engine_cannot_follow_no_image_is_drawn_without(smallest_pipe, smallest_bundle, lora, monkeypatch):
    from accel.engines.onnxruntime import OnnxRuntime

    def failing(*_):
        raise UserError("the engine of unet is not refittable", "accel build --refittable")

    with accel.attach(smallest_pipe, smallest_bundle, engine="onnxruntime"):
        before = image(smallest_pipe)
        monkeypatch.setattr(OnnxRuntime, "set_weights", failing)
        for attempt in (lambda: smallest_pipe.load_lora_weights(lora), lambda: image(smallest_pipe)):
            with pytest.raises(UserError, match="not refittable"):
                attempt()
        monkeypatch.undo()
        smallest_pipe.unload_lora_weights()
        assert np.array_equal(image(smallest_pipe), before)


def _hooked(pipe):
    pipe.unet.mid_block.register_forward_hook(lambda *_: None) if pipe.unet.mid_block else None
    pipe.unet.conv_in.register_forward_hook(lambda *_: None)


def _textual_inversion(pipe):
    pipe.load_textual_inversion({"<toy>": torch.randn(1, pipe.text_encoder.config.hidden_size)})


def _last_row(pipe):
    with torch.no_grad():
        pipe.unet.conv_in.weight[-1] += 1


def _own_attention(pipe):
    from diffusers.models.attention_processor import AttnProcessor2_0

    class OtherAttnProcessor(AttnProcessor2_0):
        pass

    pipe.unet.set_attn_processor(OtherAttnProcessor())


def _fused(pipe):
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.fuse_lora(components=["unet"])


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4), "FreeU"),
        (_hooked, "has a hook"),
        (_textual_inversion, "textual inversion"),
        (_last_row, "different weights"),
        (_own_attention, "OtherAttnProcessor"),
        (_fused, "different weights"),
    ],
    ids=["FreeU", "hook", "textual inversion", "one row of weights", "attention", "fused LoRA"],
)
def test_what_a_pipeline_has_beside_its_weights_is_refused_at_once(change, text, smallest_pipe, smallest_bundle):
    image(smallest_pipe, num_inference_steps=1)  # transformers leaves hooks of its own, which only look
    change(smallest_pipe)
    with pytest.raises(UserError, match=text) as error:
        accel.attach(smallest_pipe, smallest_bundle, engine="onnxruntime")
    assert error.value.fix and "to" not in smallest_pipe.__dict__


def test_an_attached_pipeline_saves_its_own_networks(smallest_pipe, smallest_bundle, tmp_path):
    from diffusers import StableDiffusionPipeline

    expected = image(smallest_pipe)
    with accel.attach(smallest_pipe, smallest_bundle, engine="onnxruntime"):
        smallest_pipe.save_pretrained(tmp_path / "saved")
        assert type(smallest_pipe.unet).__name__ == "CompiledUNet", "still attached"
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    saved.set_progress_bar_config(disable=True)
    assert np.array_equal(image(saved), expected)


def test_a_stand_in_is_where_its_original_is_now(smallest_pipe, smallest_bundle):
    unet = smallest_pipe.unet
    with accel.attach(smallest_pipe, smallest_bundle, engine="onnxruntime"):
        unet.to(torch.float64)
        assert smallest_pipe.unet.dtype == torch.float64, "frozen when it was attached, it would mix dtypes and devices"


def test_originals_leave_the_gpu_when_asked_and_come_back(smallest_pipe, smallest_bundle):
    """`to` is recorded: on a CPU there is nowhere else to go."""
    pipe, moves = smallest_pipe, []
    expected = image(pipe)
    for name in ("unet", "text_encoder", "vae"):
        getattr(pipe, name).to = lambda *where, name=name: moves.append((name, str(*where)))
    attached = accel.attach(pipe, smallest_bundle, engine="onnxruntime", offload=True)
    assert sorted(moves) == [("text_encoder", "cpu"), ("unet", "cpu")], "the VAE still encodes"
    assert abs(image(pipe) - expected).max() < 1 / 255 and pipe.to("cpu") is pipe
    attached.detach()
    assert sorted(moves[2:]) == [("text_encoder", "cpu"), ("unet", "cpu")] and np.array_equal(image(pipe), expected)


def test_an_attached_pipeline_stays_where_it_is(smallest_pipe, smallest_bundle):
    pipe = smallest_pipe
    with accel.attach(pipe, smallest_bundle, engine="onnxruntime"):
        assert pipe.to("cpu") is pipe and pipe.to(torch.float32) is pipe and pipe.unet.to("cpu") is pipe.unet
        assert pipe.vae.to(dtype=torch.float16) is pipe.vae, "SDXL's pipelines ask for it around the decoding"
        for move in (lambda: pipe.to("cuda"), lambda: pipe.to(torch.float16), lambda: pipe.unet.to(dtype=torch.half)):
            with pytest.raises(UserError, match="cannot be moved to") as error:
                move()
            assert "detach()" in error.value.fix
    assert pipe.to(torch.float16).unet.dtype == torch.float16, "detached, it moves again"
