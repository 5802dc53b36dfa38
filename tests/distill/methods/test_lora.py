"""LoRA: what is trained is the file and nothing else, and the file is read back as what was trained."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from accel.distill import recipes, settings
from accel.distill.data.encoders import Encoders
from accel.distill.methods.lora import LowRank, adapt, suffixes
from accel.distill.run import execute
from accel.distill.training import checkpoints
from accel.errors import MissingPackage, UserError
from accel.models.lora import WEIGHT_NAME
from accel.models.source import open_source

pytest.importorskip("peft")

BOTH = ("lora_A", "lora_B")


@pytest.fixture(scope="module")
def sd15(small) -> Path:
    """Updates belong to layers, whatever topology they lie in: diffusers' own names are tested on its SDXL too."""
    return small


@pytest.fixture(scope="module")
def images(six_images) -> Path:
    return six_images


def tiny(source: Path | str = "", images: Path | str = "", **fields) -> settings.LoraRecipe:
    common: dict = dict(
        model=str(source),
        data=str(images),
        resolution=64,
        cache="none",
        steps=4,
        batch=2,
        learning_rate=1e-2,
        rank=4,
        alpha=6.0,
        text_encoder=True,
        checkpoint_every=2,
        sample_every=0,
        log="none",
        caption_dropout=0.3,
        seed=7,
    )
    return recipes.changed(settings.LoraRecipe(), **common | fields)


def made(model: Path, *, random: bool = True, **fields) -> LowRank:
    """A method whose updates are not zero, as after training."""
    method = LowRank(tiny(model, **fields), Encoders(open_source(model)))
    method.place(torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(3)
    for network in method.networks.values():
        for name, parameter in network.model.named_parameters():
            if random and "lora_B" in name:
                parameter.data.normal_(generator=generator).mul_(0.3)
    return method


def batch_of(model: Path, method: LowRank) -> dict:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    batch = {"index": [0, 1], "caption": ["the cat", ""]}
    batch |= {"latent_mean": latents, "latent_std": torch.ones(2, 4, 16, 16)}
    if method.encoders.sdxl:
        batch["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    return batch


def image(pipe) -> np.ndarray:
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if getattr(pipe, part, None) is not None:
            getattr(pipe, part).eval()
    return pipe(
        "the cat",
        num_inference_steps=2,
        height=64,
        width=64,
        guidance_scale=3.0,
        output_type="np",
        generator=torch.Generator().manual_seed(1),
    ).images


# --------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("model", ["sd15", "sd15_tiny", "sdxl"])
@pytest.mark.parametrize("alpha", [4.0, 27.0])
def test_diffusers_loads_exactly_what_was_trained(model, alpha, request, tmp_path):
    """The same image to the bit, by a pipeline that knows only the file; also where alpha is not the rank."""
    from diffusers import DiffusionPipeline

    folder = request.getfixturevalue(model)
    method = made(folder, alpha=alpha)
    method.save(tmp_path)
    trained = image(method.pipeline())
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    base = image(pipe)
    pipe.load_lora_weights(str(tmp_path))
    assert np.array_equal(image(pipe), trained)
    assert np.abs(base - trained).max() > 0.01


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_fused_before_export_it_is_what_was_trained(model, request, tmp_path):
    folder = request.getfixturevalue(model)
    method = made(folder)
    method.save(tmp_path)
    source = open_source(folder, [tmp_path])
    fused = Encoders(source)
    texts = ["the cat", "dog the"]
    with torch.no_grad():
        wanted, found = method.encoders.prompts(texts), fused.prompts(texts)
        plain = Encoders(open_source(folder)).prompts(texts)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(plain[name], wanted[name], atol=1e-3)
        batch = batch_of(folder, method)
        out = [
            unet(
                batch["latent_mean"],
                500,
                wanted["context"],
                return_dict=False,
                added_cond_kwargs={"text_embeds": wanted.get("pooled"), "time_ids": batch.get("time_ids")},
            )[0]
            for unet in (method.unet.eval(), source.load("unet"))
        ]
    torch.testing.assert_close(out[1], out[0], rtol=1e-4, atol=1e-4)


def test_the_file_tells_alpha_and_nothing_of_this_machine(sd15, tmp_path):
    made(sd15).save(tmp_path)
    with safe_open(tmp_path / WEIGHT_NAME, "pt") as file:
        header = file.metadata()["lora_adapter_metadata"]
    assert json.loads(header)["unet.lora_alpha"] == json.loads(header)["text_encoder.lora_alpha"] == 6.0
    assert str(sd15) not in header


# ----------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_every_update_gets_a_gradient_and_nothing_else_does(model, request):
    method = made(request.getfixturevalue(model))
    assert set(method.phases[0].networks) == set(method.networks)
    assert ("text_encoder_2" in method.networks) == (model == "sdxl")
    batch = batch_of(request.getfixturevalue(model), method)
    method.loss(method.phases[0], batch, 0)[0].backward()
    for name, network in method.networks.items():
        for key, parameter in network.model.named_parameters():
            assert parameter.requires_grad == any(part in key for part in BOTH), (name, key)
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (name, key)
            else:
                assert parameter.grad is None


def test_cached_texts_are_not_used_where_the_text_encoder_learns(sd15):
    method = made(sd15)
    batch = batch_of(sd15, method)
    with torch.no_grad():
        plain = method.loss(method.phases[0], batch, 0)[0]
        stale = method.loss(method.phases[0], batch | {"context": torch.zeros(2, 77, 32)}, 0)[0]
        other = method.loss(method.phases[0], batch | {"caption": ["the dog", "cat"]}, 0)[0]
    assert plain == stale and plain != other


def test_at_the_start_the_loss_is_that_of_the_base(sd15):
    from accel.distill.methods.kd import Denoising

    method = made(sd15, random=False, text_encoder=False)
    whole = Denoising(recipes.changed(settings.FinetuneRecipe(), model=str(sd15), seed=7), Encoders(open_source(sd15)))
    batch = batch_of(sd15, method)
    batch |= method.encoders.prompts(batch["caption"])
    with torch.no_grad():
        assert method.loss(method.phases[0], batch, 0)[0] == whole.loss(whole.phases[0], batch, 0)[0]


def test_half_precision_keeps_the_updates_in_float32(sd15):
    method = made(sd15)
    method.place(torch.device("cpu"), torch.bfloat16)
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in method.unet.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_the_seed_decides_the_start_and_the_global_random_state_stays(sd15):
    before = torch.get_rng_state()
    first, again, other = made(sd15), made(sd15), made(sd15, seed=8)
    assert torch.equal(before, torch.get_rng_state())
    key = next(key for key, _ in first.unet.named_parameters() if "lora_A" in key)
    values = [dict(method.unet.named_parameters())[key] for method in (first, again, other)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def straight(sd15, images, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "out"
    torch.set_num_threads(1)
    assert not execute(tiny(sd15, images, ema=0.9), out).stopped
    return out


def newest(out: Path) -> Path:
    return checkpoints.all_of(out.with_name("out-run"))[-1]


def equal(first: Path, second: Path) -> bool:
    ours, theirs = load_file(first), load_file(second)
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_leaves_a_lora_with_its_record(straight, sd15):
    assert {path.name for path in straight.iterdir()} >= {WEIGHT_NAME, "README.md", "training.json"}
    record = json.loads((straight / "training.json").read_text())
    assert record["method"] == "Lora" and record["recipe"]["rank"] == 4
    parts = {key.split(".")[0] for key in load_file(straight / WEIGHT_NAME)}
    assert parts == {"unet", "text_encoder"}
    source = open_source(sd15, [straight])
    base = open_source(sd15).load("unet").state_dict()
    assert any(not torch.equal(value, base[key]) for key, value in source.load("unet").state_dict().items())


def test_checkpoints_hold_the_updates_alone(straight):
    for name in ("unet", "unet_ema", "text_encoder", "text_encoder_ema"):
        tensors = load_file(newest(straight) / name / checkpoints.WEIGHTS)
        assert tensors and all(any(part in key for part in BOTH) for key in tensors)
    moments = torch.load(newest(straight) / "optimizer-unet.pt", weights_only=True)["state"]
    assert moments and all(any(part in key for part in BOTH) for key in moments)


def test_the_averaged_weights_are_the_result(straight):
    saved = load_file(straight / WEIGHT_NAME)
    for folder, same in (("unet_ema", True), ("unet", False)):
        kept = load_file(newest(straight) / folder / checkpoints.WEIGHTS)
        kept = {f"unet.{key.replace('.default', '')}": value for key, value in kept.items()}
        assert all(torch.equal(saved[key], value) for key, value in kept.items()) == same


def start(recipe: settings.Recipe, out: Path) -> subprocess.Popen:
    given = []
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if value != getattr(settings.LoraRecipe(), field.name):
            name = field.name.replace("_", "-")
            given += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}={value}"]
    command = [sys.executable, "-m", "accel", "distill", "lora", "--out", str(out), *given]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_to_the_same_weights(straight, sd15, images, tmp_path):
    """Killed after a step that no checkpoint holds; gone on with by the same settings."""
    recipe, out = tiny(sd15, images, ema=0.9), tmp_path / "out"
    process = start(recipe, out)
    log = tmp_path / "out-run" / "losses.jsonl"
    while process.poll() is None and (not log.is_file() or len(log.read_text().splitlines()) < 3):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not out.exists() and len(checkpoints.all_of(tmp_path / "out-run")) == 1
    assert not execute(recipe, out).stopped
    assert equal(out / WEIGHT_NAME, straight / WEIGHT_NAME)
    for name in ("unet", "text_encoder", "unet_ema"):
        assert equal(newest(out) / name / checkpoints.WEIGHTS, newest(straight) / name / checkpoints.WEIGHTS)


def test_with_a_cache_the_latents_come_from_it_and_the_texts_do_not(sd15, images, tmp_path):
    recipe = tiny(sd15, images, cache="auto", cache_dtype="float32", cache_variants=1, random_flip=False, steps=3)
    assert not execute(recipe, tmp_path / "out").stopped
    assert not execute(dataclasses.replace(recipe, cache="none"), tmp_path / "plain" / "out").stopped
    ours, theirs = load_file(tmp_path / "out" / WEIGHT_NAME), load_file(tmp_path / "plain" / "out" / WEIGHT_NAME)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-4)


def test_training_lowers_the_loss(sd15, images, tmp_path):
    assert not execute(tiny(sd15, images, steps=40, text_encoder=False), tmp_path / "out").stopped
    rows = [json.loads(line)["task"] for line in (tmp_path / "out-run" / "losses.jsonl").read_text().splitlines()]
    assert np.mean(rows[-10:]) < 0.95 * np.mean(rows[:10])


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "fields, text, fix",
    [
        ({"targets": "to_q,to_x"}, "'to_x'", "to_out.0"),
        ({"text_targets": "fc9"}, "'fc9'", "fc1"),
        ({"targets": " , "}, "no target layers", "to_k"),
        ({"rank": 0}, "invalid rank: 0", "finetune"),
        ({"alpha": 0.0}, "invalid alpha: 0.0", "--alpha"),
    ],
)
def test_settings_that_cannot_be(sd15, fields, text, fix):
    with pytest.raises(UserError) as caught:
        made(sd15, **fields)
    assert text in caught.value.message and fix in caught.value.fix


def test_without_peft_the_fix_is_named(sd15, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(MissingPackage, match="train"):
        made(sd15)


def test_suffixes_keep_numbers_with_their_names():
    names = ["a.to_q", "b.to_q", "a.to_out.0", "conv_in", "net.0.proj"]
    assert suffixes(names) == ["conv_in", "proj", "to_out.0", "to_q"]


def test_convolutions_can_be_adapted(sd15, tmp_path):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(sd15 / "unet")
    adapt(unet, ["conv1", "time_emb_proj"], 2, 2.0, seed=0)
    trained = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert trained and all("conv1" in name or "time_emb_proj" in name for name in trained)
