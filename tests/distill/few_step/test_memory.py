"""The memory that a run would need, against what is held when it runs."""

import functools
import json
import subprocess
import sys

import pytest
import torch

from accel.distill import recipes, settings
from accel.distill.data.encoders import Encoders, encoded
from accel.distill.data.examples import Examples, loader
from accel.distill.few_step import memory
from accel.distill.methods import qat
from accel.distill.registry import entry_of, load
from accel.distill.run import encoders_of
from accel.distill.sources.open_data import open_data
from accel.distill.training import speed
from accel.errors import UserError
from accel.int8 import fake_quant
from accel.models.source import open_source


def recipe(model, make=settings.DMD2Recipe, **fields):
    common = dict(model=str(model), data="digits", resolution=64, random_flip=False, cache="none", batch=2, few_steps=1)
    return recipes.changed(make(), **common | fields)


def measured(given):
    """Peak bytes of all phases, weights not counted, of tensors that do exist."""
    method = load(entry_of(given).factory)(given, Encoders(open_source(given.model)))
    method.place(torch.device("cpu"), torch.float32)
    examples = Examples(open_data("digits"), seed=0, resolution=64, random_flip=False)
    batch = encoded(next(loader(examples, batch=2)), method.encoders)
    if qat.attach(method, given):
        fake_quant.set_mode(method.generator, "quantize")
    if given.gradient_checkpointing:
        for network in method.networks.values():
            network.core.enable_gradient_checkpointing()
    return max(max(memory.phase_bytes(method, phase, batch, False)) for phase in method.phases)


@functools.cache
def predicted(model, **fields):
    given = recipe(model, **fields)
    return memory.predict(given, encoders_of(given), foreach=False)


@pytest.mark.parametrize("fields", [{}, dict(gradient_checkpointing=True), dict(rank=2, critic_rank=2)])
def test_the_prediction_is_what_a_run_holds(smallest, fields):
    said = predicted(smallest, **fields)
    given = recipe(smallest, **fields)
    assert said.parts["gradients and activations"] == pytest.approx(measured(given), rel=0.05)
    unet = open_source(smallest).load("unet")
    count = sum(p.numel() for p in unet.parameters())
    whole, learn = said.parameters["generator"]
    if given.rank:
        assert learn < count < whole and said.parts["frozen weights"] == pytest.approx(4 * count, rel=0.01)
    else:
        assert whole == learn == count and said.parts["frozen weights"] == 4 * count
        assert said.parts["moments"] == 2 * said.parts["weights that learn"]


@pytest.mark.parametrize("fields", [{}, dict(rank=2, gradient_checkpointing=True, ema=0.9)])
def test_so_is_that_of_consistency_distillation(smallest, fields):
    """Teacher and student are two networks, or one under a LoRA."""
    fields = fields | dict(make=settings.LCMRecipe)
    said, given = predicted(smallest, **fields), recipe(smallest, **fields)
    assert said.parts["gradients and activations"] == pytest.approx(measured(given), rel=0.05)
    count = sum(p.numel() for p in open_source(smallest).load("unet").parameters())
    learn = said.parameters["unet"][1]
    assert said.parameters["teacher"] == (count + (learn if given.rank else 0), 0)
    assert learn < count if given.rank else learn == count
    assert said.parts["weights that learn"] == 4 * learn and said.parts["moments"] == 8 * learn
    assert said.parts["frozen weights"] == 4 * count and said.parts.get("average", 0) == 4 * learn * bool(given.ema)


def test_a_prediction_says_what_was_left_to_the_machine(smallest):
    assert predicted(smallest).lines()[0] == f"as on {speed.device_of_process().type}: float32"
    assert "bf16" in predicted(smallest, mixed_precision="bf16").how


@pytest.mark.parametrize("ranges", ["learned", "observed"])
def test_rounding_takes_memory_that_is_predicted(smallest, ranges):
    rest, fields = "gradients and activations", dict(qat="attention", qat_ranges=ranges)
    said = predicted(smallest, **fields).parts[rest]
    assert said == pytest.approx(measured(recipe(smallest, **fields)), rel=0.05)
    assert said > 1.2 * predicted(smallest, qat="all").parts[rest] > 1.2 * predicted(smallest).parts[rest]


def test_more_processes_and_smaller_moments_need_less(sd15):
    small = dict(resolution=32, batch=1, gradient_checkpointing=True)  # so that gradients are more than activations
    given = recipe(sd15, optimizer="adamw8bit", **small)
    alone, shared = predicted(sd15, **small), memory.predict(given, encoders_of(given), shards=4, foreach=False)
    assert shared.parts["moments"] == pytest.approx(alone.parts["moments"] / 16, rel=0.01)
    rest, critic = "gradients and activations", alone.parts["weights that learn"] / 2
    assert 0.25 * critic < alone.parts[rest] - shared.parts[rest] <= 0.75 * critic
    assert shared.parts["weights that learn"] == pytest.approx(alone.parts["weights that learn"] / 4, rel=0.01)


def test_what_a_run_would_refuse_is_not_planned(smallest):
    given = recipe(smallest, rank=2, critic_rank=2)
    with pytest.raises(UserError, match="FSDP cannot shard"):
        memory.predict(given, encoders_of(given), shards=4)


def test_a_teacher_that_is_away_weighs_nothing_outside_of_its_call(smallest):
    near, away = predicted(smallest), predicted(smallest, teacher=str(smallest), offload_teacher=True)
    assert near.parts["frozen weights"] == 4 * near.parameters["teacher"][0] and "frozen weights" not in away.parts
    assert near.peak - near.parts["frozen weights"] <= away.peak <= near.peak


@pytest.mark.parametrize("method", ["dmd2", "lcm"])
def test_the_command_loads_no_weights(smallest, tmp_path, method):
    import shutil

    folder = shutil.copytree(smallest, tmp_path / "model")
    for path in (folder / "unet").glob("*.safetensors"):
        path.write_bytes(b"no weights at all")
    teacher = shutil.copytree(folder, tmp_path / "teacher")
    command = [sys.executable, "-m", "accel", "distill", method, "--model", str(folder), "--resolution", "64"]
    command += ["--teacher", str(teacher)]
    done = subprocess.run([*command, "--batch", "1", "--memory-estimate", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["peak_bytes"] == sum(said["parts"].values()) > 0
