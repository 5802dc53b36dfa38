"""The tensors that a bundle's engines run with: in its own dtypes, int8 too, and kept in the cache."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from accel.bundle import Bundle
from accel.errors import Notice, UserError
from accel.models import weight_files
from accel.models.lora import for_bundle
from accel.models.lora.for_bundle import Weights, fused
from accel.parity import relative_l2

LAYER = "down_blocks.0.resnets.0.conv1"


def difference(bundle: Bundle, out, layer: str = LAYER, size: float = 0.1, seed: int = 0):
    """A file that adds noise to one layer of the UNet."""
    record = bundle.component("unet")
    shape = Weights(weight_files.stored(bundle.file(record.weights)), record).shapes[f"{layer}.weight"]
    noise = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    save_file({f"unet.{layer}.diff": noise}, out)
    return out, noise.numpy()


def own(bundle: Bundle) -> Weights:
    record = bundle.component("unet")
    return Weights(weight_files.stored(bundle.file(record.weights)), record)


def test_only_what_changes_is_there_in_the_bundles_dtype(smallest_bundle, tmp_path):
    bundle = Bundle.open(smallest_bundle)
    file, noise = difference(bundle, tmp_path / "a.safetensors")
    found = fused(bundle, [f"{file}=0.5"])
    assert {name: set(tensors) for name, tensors in found.tensors.items()} == {"unet": {f"{LAYER}.weight"}}
    made, before = found.tensors["unet"][f"{LAYER}.weight"], own(bundle).value(f"{LAYER}.weight")
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, before + 0.5 * noise, rtol=1e-6, atol=1e-7)
    assert fused(bundle, []).tensors == {} and fused(bundle, None).digest == ""
    assert fused(bundle, f"{file}=0").tensors == {}, "a single file is taken too"


@pytest.mark.parametrize("layer", [LAYER, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"])
def test_an_int8_layer_is_quantized_anew_and_its_ranges_stay(layer, tmp_path):
    bundle = Bundle.open("digits/4step-int8")
    weights = own(bundle)
    assert layer in weights.layers
    file, noise = difference(bundle, tmp_path / "a.safetensors", layer)
    made = dict(fused(bundle, [file]).tensors["unet"])
    assert set(made) == {f"{layer}.weight", f"{layer}.weight_scale"}
    assert {key: (value.shape, value.dtype) for key, value in made.items()} == {
        key: (weights.tensors[key].shape, weights.tensors[key].dtype) for key in made
    }
    after = Weights({**weights.tensors, **made}, bundle.component("unet")).value(f"{layer}.weight")
    wanted = weights.value(f"{layer}.weight") + noise
    step = made[f"{layer}.weight_scale"].reshape(-1, *[1] * (wanted.ndim - 1))
    assert np.all(np.abs(after - wanted) <= 0.501 * step)
    assert relative_l2(after, weights.value(f"{layer}.weight")) > 0.1


def test_what_an_int8_layer_is_multiplied_out_to_packs_to_the_same_bytes():
    weights = own(Bundle.open("digits/4step-int8"))
    made = weights.as_stored(
        {f"{layer}.weight": weights.value(f"{layer}.weight") for layer in list(weights.layers)[:40:3]}
    )
    assert made
    for name, tensor in made.items():
        if name.endswith(".weight"):
            assert np.array_equal(tensor, weights.tensors[name])
        else:
            np.testing.assert_allclose(tensor, weights.tensors[name], rtol=1e-6)


def test_a_smoothed_layer_is_multiplied_out_and_packed_as_torch_does_it():
    from accel.int8 import fake_quant, packed
    from accel.int8.config import Int8Config

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    fake_quant.attach(model, Int8Config(), names=["0"])
    model[0].smooth = torch.rand(8) + 0.5
    fresh = torch.randn(6, 8)
    traits = fake_quant.traits(model)
    packed.pack(model)
    record = dataclasses.replace(Bundle.open("digits/4step-int8").component("unet"), int8={"layers": traits})
    before = {name: value.numpy() for name, value in model.state_dict().items()}
    made = Weights(before, record).as_stored({"0.weight": fresh.numpy()})
    again = torch.nn.Sequential(torch.nn.Linear(8, 6))
    fake_quant.attach(again, Int8Config(), names=["0"])
    again[0].smooth = torch.as_tensor(before["0.smooth"])
    again[0].weight.data = fresh
    packed.pack(again)
    for name, value in made.items():
        np.testing.assert_array_equal(value, again.state_dict()[name].numpy())
    assert set(made) == {"0.weight", "0.weight_scale"}


def test_half_precision_that_overflows_is_refused(smallest_bundle):
    record = Bundle.open(smallest_bundle).component("unet")
    weights = Weights({"x.weight": np.ones((2, 2), np.float16)}, record)
    assert weights.as_stored({"x.weight": np.full((2, 2), 2.0, np.float32)})["x.weight"].dtype == np.float16
    with pytest.raises(UserError, match="does not fit float16"):
        weights.as_stored({"x.weight": np.full((2, 2), 1e6, np.float32)})


def test_what_was_fused_is_found_again_unless_it_is_damaged(smallest_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    bundle = Bundle.open(smallest_bundle)
    file, _ = difference(bundle, tmp_path / "a.safetensors")
    first, fuses = fused(bundle, [file]), []
    real = for_bundle.fused_weights
    monkeypatch.setattr(for_bundle, "fused_weights", lambda *args: fuses.append(1) or real(*args))

    def again():
        found = fused(bundle, [file])
        assert found.digest == first.digest
        np.testing.assert_array_equal(
            found.tensors["unet"][f"{LAYER}.weight"], first.tensors["unet"][f"{LAYER}.weight"]
        )
        return len(fuses)

    assert again() == 0
    (kept,) = (tmp_path / "cache/loras").glob("*/unet.safetensors")
    os.truncate(kept, 100)
    fresh = again()
    assert fresh > 0 and again() == fresh
    kept.unlink()
    assert again() > fresh
    changed, _ = difference(bundle, tmp_path / "a.safetensors", seed=1)
    assert fused(bundle, [changed]).digest != first.digest != fused(bundle, [f"{file}=0.5"]).digest


def test_the_cache_keeps_what_was_used_last(smallest_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    bundle = Bundle.open(smallest_bundle)
    file, noise = difference(bundle, tmp_path / "a.safetensors")
    monkeypatch.setattr(for_bundle, "KEPT_BYTES", 3 * noise.nbytes)
    found = [fused(bundle, [f"{file}={scale}"]).digest[:32] for scale in (1, 2, 3, 4)]
    kept = {path.name for path in (tmp_path / "cache/loras").iterdir() if not path.name.startswith(".")}
    assert found[3] in kept and found[0] not in kept
    monkeypatch.setattr(for_bundle, "KEPT_BYTES", 10)
    assert fused(bundle, [f"{file}=9"]).tensors, "too large to keep is no obstacle"


def test_a_few_step_lora_is_not_sampled_as_usual_without_a_word(smallest_bundle, tmp_path):
    bundle = Bundle.open(smallest_bundle)
    file, _ = difference(bundle, tmp_path / "Hyper-SD15-4steps-lora.safetensors")
    with pytest.warns(Notice, match=r"few-step LoRA \(hyper-sd\).*sampler='ddim', steps=4, guidance_scale=0"):
        fused(bundle, [file])


def test_a_lora_for_a_network_that_the_bundle_lacks(smallest_bundle, tmp_path):
    save_file({"text_encoder_2.encoder.layers.0.mlp.fc1.diff": torch.ones(2, 2)}, tmp_path / "xl.safetensors")
    with pytest.raises(UserError, match="no text_encoder_2.*made for SDXL"):
        fused(Bundle.open(smallest_bundle), [tmp_path / "xl.safetensors"])
