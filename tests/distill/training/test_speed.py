"""What a device is given: chosen for it, said, honoured or refused, and never in the files."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from accel.distill import recipes, settings
from accel.distill.run import execute
from accel.distill.training import checkpoints, parts, speed
from accel.distill.training.loop import Loop
from accel.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def gpu(monkeypatch):
    """gpu(8, 0): torch says that this is the GPU's compute capability."""

    def has(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")

    return has


def run_of(model, **fields):
    common: dict = dict(model=str(model), data="digits", resolution=64, random_flip=False, cache="none", batch=2)
    common |= dict(steps=4, checkpoint_every=2, sample_every=0, log="none", ema=0.9, learning_rate=1e-3, seed=5)
    return recipes.changed(settings.FinetuneRecipe(), **common | fields)


def lines(run):
    return [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]


def same(first, second):
    ours, theirs = load_file(first), load_file(second)
    return all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


# -------------------------------------------------------------------------------------------------------------- choices


def test_a_new_gpu_is_given_everything_and_a_cpu_nothing(gpu):
    gpu(9, 0)
    made = speed.settled(settings.FinetuneRecipe(), GPU)
    assert (made.mixed_precision, made.tf32, made.channels_last, made.fused) == ("bf16", "on", "on", "on")
    assert 1 <= made.workers <= speed.WORKERS and speed.settled(made, GPU) == made
    said = speed.described(made, GPU)
    assert said.startswith("A GPU: bf16, TF32, channels-last, fused AdamW, foreach averages, ")
    plain = speed.settled(settings.FinetuneRecipe(), CPU)
    assert (plain.mixed_precision, plain.tf32, plain.channels_last, plain.fused) == ("no", "off", "off", "off")
    assert plain.workers == 0 and speed.described(plain, CPU) == "cpu: float32"


def test_an_old_gpu_and_shards_are_given_what_they_take(gpu):
    gpu(7, 5)
    made = speed.settled(settings.FinetuneRecipe(), GPU)
    assert (made.mixed_precision, made.tf32, made.channels_last, made.fused) == ("no", "off", "off", "on")
    gpu(9, 0)
    shards = speed.settled(settings.FinetuneRecipe(), GPU, sharded=True)
    assert (shards.channels_last, shards.fused, shards.tf32) == ("off", "off", "on")


def test_what_was_said_stays(gpu):
    gpu(9, 0)
    said = dict(mixed_precision="no", tf32="off", channels_last="off", fused="off", workers=0)
    given = dataclasses.replace(settings.FinetuneRecipe(), **said)
    assert speed.settled(given, GPU) == given


@pytest.mark.parametrize(
    ("fields", "sharded", "words"),
    [
        (dict(tf32="on"), False, "needs a CUDA device"),
        (dict(half_norms=True), False, "no effect in float32"),
        (dict(channels_last="on"), True, "does not take weights"),
        (dict(fused="on"), True, "do not go with FSDP2"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields, sharded, words):
    with pytest.raises(UserError, match=words):
        speed.settled(dataclasses.replace(settings.FinetuneRecipe(), **fields), CPU, sharded=sharded)


# ------------------------------------------------------------------------------------------------------------ in effect


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "out"
    execute(run_of(small), out)
    return out


@pytest.mark.parametrize("fields", [dict(channels_last="on"), dict(fused="on"), dict(channels_last="on", fused="on")])
def test_layout_and_kernels_change_losses_by_rounding_alone(small, straight, tmp_path, fields):
    out = tmp_path / "out"
    execute(run_of(small, **fields), out)
    pairs = zip(lines(tmp_path / "out-run"), lines(straight.with_name("out-run")), strict=True)
    assert all(ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4) for ours, theirs in pairs)
    ours, theirs = load_file(out / UNET), load_file(straight / UNET)  # files are contiguous, or this fails
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-4) for name in theirs)


def test_a_run_with_fused_kernels_goes_on_exactly_and_on_a_device_without(small, tmp_path):
    fast = run_of(small, fused="on", channels_last="on")
    execute(fast, tmp_path / "whole")
    for name, second in (("same", fast), ("other", run_of(small))):
        execute(dataclasses.replace(fast, steps=2), tmp_path / name)
        execute(second, tmp_path / name, overwrite=True)
    assert same(tmp_path / "same" / UNET, tmp_path / "whole" / UNET)
    ours, theirs = load_file(tmp_path / "other" / UNET), load_file(tmp_path / "whole" / UNET)
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-4) for name in theirs)


def test_the_optimizer_and_the_averages_take_the_kernels_that_were_chosen(small):
    parameters = [nn.Parameter(torch.zeros(2))]
    made = {name: parts.optimizer(run_of(small, fused=name), parameters, None) for name in ("on", "off")}
    assert made["on"].defaults["fused"] and not made["off"].defaults["fused"]


# -------------------------------------------------------------------------------------------------- figures read later


@pytest.fixture
def ahead(monkeypatch):
    """The loop as on a GPU: a step is queued before the figures of the one before it are read."""
    monkeypatch.setattr(Loop, "ahead", property(lambda self: True, lambda self, value: None), raising=False)


def test_figures_that_are_read_later_change_nothing(small, straight, tmp_path, ahead):
    execute(run_of(small), tmp_path / "out")
    assert same(tmp_path / "out" / UNET, straight / UNET)
    ours, theirs = lines(tmp_path / "out-run"), lines(straight.with_name("out-run"))
    for line in (*ours, *theirs):
        del line["seconds"]
    assert ours == theirs


def test_what_is_not_finite_is_found_before_a_checkpoint(small, tmp_path, monkeypatch, ahead):
    from accel.distill.methods.kd import Denoising

    real, steps = Denoising.loss, []

    def loss(self, phase, batch, step):
        steps.append(step)
        total, terms = real(self, phase, batch, step)
        return (total * float("nan") if step == 2 else total), terms

    monkeypatch.setattr(Denoising, "loss", loss)
    with pytest.raises(UserError, match="at step 3"):
        execute(run_of(small, steps=9, checkpoint_every=2), tmp_path / "out")
    assert steps == [0, 1, 2, 3]  # the step after it had begun
    assert [path.name for path in checkpoints.all_of(tmp_path / "out-run")] == ["step-000002"]
    assert [line["step"] for line in lines(tmp_path / "out-run")] == [1, 2]


# ---------------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("layer", [nn.GroupNorm(4, 16), nn.LayerNorm(16), nn.LayerNorm(16, elementwise_affine=False)])
def test_norms_in_half_are_as_near_as_half_is(layer):
    torch.manual_seed(0)
    x = torch.randn(3, 16, 16, dtype=torch.bfloat16)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    wanted, half = layer.double()(x.double()), copy.deepcopy(layer).float()
    speed.norms_in_half(half)
    with torch.autocast("cpu", torch.bfloat16):
        made = half(x)
    assert made.dtype == torch.bfloat16
    rounded = wanted.bfloat16().double()
    assert (made.double() - wanted).abs().max() <= 4 * (rounded - wanted).abs().max()
    if parameters := list(half.parameters()):
        made.float().square().sum().backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in parameters)


def test_norms_in_half_train_and_are_part_of_the_settings(small, tmp_path):
    given = run_of(small, half_norms=True, mixed_precision="bf16", steps=2)
    execute(given, tmp_path / "out")
    assert all(line["loss"] == line["loss"] for line in lines(tmp_path / "out-run"))
    with pytest.raises(UserError, match="half_norms was True"):
        execute(dataclasses.replace(given, half_norms=False), tmp_path / "out", overwrite=True)
