"""The nodes on stand-ins of ComfyUI's interfaces: they draw accel's image."""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import accel
from accel import UserError
from accel.bundle import Bundle
from accel.sampling import noise

ROOT = Path(__file__).parents[2] / "integrations" / "comfyui"
PROMPT, SEED = "a handwritten seven", 7


@pytest.fixture
def nodes(fakes, monkeypatch, tmp_path):
    """The package, as ComfyUI imports it from custom_nodes."""
    fakes("comfy").install(monkeypatch, tmp_path)
    spec = importlib.util.spec_from_file_location(
        "accel_nodes", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    package = importlib.util.module_from_spec(spec)
    for name in [name for name in sys.modules if name.split(".")[0] == "accel_nodes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "accel_nodes", package)
    spec.loader.exec_module(package)
    return package.NODE_CLASS_MAPPINGS


def test_every_node_has_what_comfyui_asks_for(nodes):
    for node in nodes.values():
        assert callable(getattr(node(), node.FUNCTION)) and node.CATEGORY == "accel"
        assert set(node.INPUT_TYPES()) <= {"required", "optional"} and node.RETURN_TYPES


def sampled(model, sigmas, context, bundle) -> torch.Tensor:
    """ComfyUI's lcm sampler at cfg 1, with accel's noise: latents as LATENT holds them."""
    constants = bundle.manifest.pipeline
    side = constants["native_size"] // constants["vae_scale"]
    draws = [torch.as_tensor(noise.normal([SEED], i, (constants["latent_channels"], side, side))) for i in range(9)]
    x = draws[0].double() * math.sqrt(1 + float(sigmas[0]) ** 2)
    for i, sigma in enumerate(sigmas[:-1]):
        x = model.model.apply_model(x, sigma.reshape(1), context)
        if sigmas[i + 1] > 0:
            x = x + draws[i + 1] * float(sigmas[i + 1])
    return model.model.latent_format.process_out(x).float()


def test_loader_sampling_and_decoder_draw_accels_image(nodes):
    bundle = Bundle.open("digits/4step-int8")
    model, clip, vae, lent = nodes["AccelLoader"]().load("digits/4step-int8", "openvino")
    sampler, sigmas, cfg = nodes["AccelSampling"]().constants(lent)
    assert (sampler.name, len(sigmas), cfg) == ("lcm", 5, 1.0) and float(sigmas[-1]) == 0
    ((context, extras),) = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    assert extras == {"pooled_output": None}
    image = vae.decode(sampled(model, sigmas, context, bundle)).numpy()
    ours = accel.load("digits/4step-int8", engine="openvino")(PROMPT, seed=SEED, output_type="np").images
    mean = float(((image - ours) ** 2).mean())
    assert image.shape == ours.shape and (mean == 0 or -10 * math.log10(mean) > 30)  # int8 rounds to the other side


def test_draw_is_accels_own_image(nodes):
    lent = nodes["AccelLoader"]().load("digits/1step-int8", "openvino")[3]
    (image,) = nodes["AccelDraw"]().draw(lent, PROMPT, SEED)
    ours = accel.load("digits/1step-int8", engine="openvino")(PROMPT, seed=SEED, output_type="np").images
    assert np.array_equal(image.numpy(), ours)


def test_the_memory_manager_is_told_the_true_size(nodes):
    model = nodes["AccelLoader"]().load("digits/1step-int8", "openvino")[0]
    stored = Bundle.open("digits/1step-int8").manifest.files["unet/model.safetensors"]["bytes"]
    assert model.model_size() == model.loaded_size() == model.size == stored
    assert model.partially_unload("cpu", 1 << 30) == 0 and model.memory_required((1, 4, 16, 16)) == 0


def test_a_lora_is_fused_at_run_time_and_taken_out_again(nodes, sd15_bundle, tmp_path):
    from safetensors.numpy import load_file, save_file

    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    out, into = load_file(sd15_bundle / "unet/model.safetensors")[f"{layer}.weight"].shape
    rng = np.random.default_rng(0)
    parts = {"lora_A": (4, into), "lora_B": (out, 4)}
    (tmp_path / "loras").mkdir()
    save_file(
        {f"unet.{layer}.{part}.weight": rng.normal(size=shape).astype(np.float32) for part, shape in parts.items()},
        tmp_path / "loras/style.safetensors",
    )
    shutil.copytree(sd15_bundle, tmp_path / "accel/sd")
    lent = nodes["AccelLoader"]().load("sd", "onnxruntime")[3]
    styled = nodes["AccelLora"]().add(lent, "style.safetensors", 0.5)[3]
    draw = nodes["AccelDraw"]().draw
    plain, with_style, again = (draw(one, "a cat", 3, steps=2)[0].numpy() for one in (lent, styled, lent))
    with accel.load(sd15_bundle, "onnxruntime", loras=[f"{tmp_path}/loras/style.safetensors=0.5"]) as pipe:
        ours = pipe("a cat", seed=3, steps=2, output_type="np").images
    assert np.array_equal(plain, again) and np.abs(with_style - plain).max() > 1e-5
    assert np.abs(with_style - ours).max() < 1e-5
    assert lent.pipeline is styled.pipeline  # one copy of the engines


def test_what_a_compiled_network_cannot_do_is_refused(nodes):
    model, clip, vae, _ = nodes["AccelLoader"]().load("digits/1step-int8", "openvino")
    x, t, context = torch.zeros(1, 4, 16, 16), torch.tensor([399.0]), torch.zeros(1, 77, 64)
    with pytest.raises(UserError, match="a ControlNet needs the inner layers"):
        model.model.diffusion_model(x, t, context, control={"input": []})
    with pytest.raises(UserError, match="a patch of attn1_patch"):
        model.model.diffusion_model(x, t, context, transformer_options={"patches": {"attn1_patch": [1]}})
    for part in (model, clip):
        with pytest.raises(UserError) as refused:
            part.add_patches({"some.weight": 1})
        assert "Accel LoRA" in refused.value.fix
    with pytest.raises(UserError, match="no VAE encoder"):
        vae.encode(torch.zeros(1, 64, 64, 3))


def test_rows_at_different_timesteps_are_computed_one_by_one(nodes):
    unet = nodes["AccelLoader"]().load("digits/1step-int8", "openvino")[0].model.diffusion_model
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 64)
    both = unet(x, torch.tensor([399.0, 100.0]), context)
    for i, t in enumerate((399.0, 100.0)):
        assert torch.equal(both[i : i + 1], unet(x[i : i + 1], torch.tensor([t]), context[i : i + 1]))


def test_sdxls_sizes_are_read_out_of_their_embeddings(nodes):
    from accel_nodes.model import _numbers

    sizes = torch.tensor([[1024.0, 768.0, 0.0, 33.0, 8192.0, 1.0], [512.0, 512.0, 5.0, 6.0, 640.0, 7.0]])
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = sizes.reshape(-1, 1) * frequencies[None]
    embedded = torch.cat([angles.cos(), angles.sin()], dim=-1).reshape(2, -1)
    assert torch.equal(_numbers(embedded.float()), sizes)
