"""A training method is its own file and one line of the registry; checkpoints know methods by the names of old."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accel.cli import main
from accel.distill import recipes, registry, settings
from accel.distill.registry import METHODS, MethodEntry
from accel.distill.run import execute
from accel.distill.settings import Recipe, default, option
from accel.distill.training import checkpoints
from accel.distill.training.checkpoints import WEIGHTS
from accel.distill.training.method import OptimizerPhase, TrainedNetwork
from accel.errors import UserError

# --------------------------------------------------------------------------------------------- a method, as in its file


@dataclass(frozen=True, kw_only=True)
class ToyRecipe(Recipe):
    """Learns the mean of the latents."""

    pull: float = option(1.0, "weight of the loss", above=0)
    side: str = option("left", "which half of the latents", choices=("left", "right"))
    learning_rate: float = default("learning_rate", 0.1)


class Toy:
    def __init__(self, recipe: ToyRecipe, encoders):
        self.recipe, self.model = recipe, nn.Linear(1, 4)
        nn.init.zeros_(self.model.weight), nn.init.zeros_(self.model.bias)
        self.networks = {"toy": TrainedNetwork(self.model, self.model)}
        self.phases = (OptimizerPhase("toy", ("toy",)),)

    def place(self, device, dtype):
        self.model.to(device)

    def loss(self, phase, batch, step):
        half = batch["latent_mean"].chunk(2, -1)[self.recipe.side == "right"].mean((2, 3))
        made = self.networks["toy"].module(torch.ones(len(half), 1))
        error = (made - half).square().mean()
        return self.recipe.pull * error, {"error": error}

    def samples(self):
        raise AssertionError("none are asked for")

    def save(self, folder: Path):
        save_file(
            {name: value.contiguous() for name, value in self.model.state_dict().items()}, folder / "toy.safetensors"
        )


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", MethodEntry(f"{__name__}:ToyRecipe", "learn a mean", f"{__name__}:Toy"))


def common(**fields):
    return (
        dict(model="digits", data="digits", resolution=64, batch=4, sample_every=0, log="none", cache="none") | fields
    )


def test_a_method_of_one_file_and_one_line_trains_and_resumes(toy, tmp_path):
    recipe = recipes.changed(registry.recipe("toy"), **common(steps=2, checkpoint_every=1))
    assert execute(recipe, tmp_path / "out").steps == 2
    lines = [json.loads(line) for line in (tmp_path / "out-run/losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[1]["error"] != lines[0]["error"]
    learnt = load_file(tmp_path / "out/toy.safetensors")
    assert all(value.abs().max() > 0.05 for value in learnt.values())  # two steps of AdamW at 0.1
    assert json.loads((tmp_path / "out/training.json").read_text())["method"] == "Toy"
    assert execute(recipes.changed(recipe, steps=3), tmp_path / "more", tmp_path / "out-run").steps == 3
    with pytest.raises(UserError, match="side was 'left', is now 'right'"):
        execute(recipes.changed(recipe, side="right"), tmp_path / "other", tmp_path / "out-run")


def test_it_is_in_the_help_and_runs_from_the_command_line(toy, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    assert "learn a mean" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["distill", "toy", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--pull X weight of the loss (default: 1.0)" in text and "--side {left,right}" in text
    given = [f"--{name.replace('_', '-')}={value}" for name, value in common(steps=1).items()]
    assert main(["distill", "toy", *given, "--out", str(tmp_path / "out"), "--side", "right"]) == 0
    assert (tmp_path / "out/toy.safetensors").is_file()


def test_the_rules_of_a_field_are_checked_wherever_it_comes_from(toy, tmp_path, capsys):
    assert main(["distill", "toy", "--side", "up", "--out", str(tmp_path / "out")]) == 2
    assert "--side 'up' is not known" in capsys.readouterr().err
    for fields, words in (
        (dict(side="up"), "invalid side: 'up' .expected one of: left, right"),
        (dict(pull=0.0), "invalid pull: 0.0 .expected a finite number > 0"),
        (dict(learning_rate=-1.0), "invalid learning_rate: -1.0 .expected a finite number >= 0"),
    ):
        with pytest.raises(UserError, match=words):
            execute(recipes.changed(ToyRecipe(), **common(**fields)), tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------ the table


def test_every_entry_names_code_that_is_there():
    for entry in METHODS.values():
        for reference in (entry.factory, entry.encoders, entry.batches, entry.complete, entry.memory_estimate):
            assert not reference or callable(registry.load(reference))
        for preset in entry.presets.split():
            assert type(registry.recipe(preset)) is type(entry.settings()), preset


def test_every_recipe_function_belongs_to_a_method():
    functions = {name for name, value in vars(recipes).items() if getattr(value, "__module__", "") == recipes.__name__}
    named = {preset for entry in METHODS.values() for preset in entry.presets.split()}
    named |= {entry.recipe.partition(":")[2] for entry in METHODS.values() if entry.recipe.startswith(".recipes")}
    assert functions - {"changed", "R"} == named


def test_a_recipe_of_another_method_is_refused_with_those_of_this_one():
    assert registry.recipe("digits-tiny", "tiny").student == "tiny"
    with pytest.raises(UserError, match="unknown recipe 'digits_tiny' of small") as caught:
        registry.recipe("digits_tiny", "small")
    assert caught.value.fix == "did you mean digits_small? one of: small, sd15_small, digits_small"


def test_every_default_keeps_its_own_rules():
    for entry in METHODS.values():
        settings.check(entry.settings())


def test_the_table_and_its_help_need_no_torch():
    code = "import sys; from accel.cli import main\ntry: main(['distill', 'dmd2', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "False" and "--memory-estimate" in done.stdout


# ---------------------------------------------------------------------------------------------- what was written before


def test_checkpoints_know_the_methods_by_their_names_of_before():
    names = {verb: checkpoints.settings(entry.settings(), 1)["method"] for verb, entry in METHODS.items()}
    students = dict.fromkeys(("base", "small", "tiny", "ssd-1b", "vega"), "Distillation")
    assert names == students | {
        "dmd2": "DMD2",
        "lcm": "LCM",
        "regress": "Regression",
        "finetune": "Finetune",
        "lora": "Lora",
        "dreambooth": "DreamBooth",
        "vae": "TinyVae",
    }


def as_before(checkpoint: Path) -> None:
    """A checkpoint of 0.1: "turns" and no digests in state.json, "told" for the critic's embedding of the steps."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state["files"], state["digest"]
    state["turns"] = state.pop("phases")
    (checkpoint / "state.json").write_text(json.dumps(state))
    weights = load_file(checkpoint / "critic" / WEIGHTS)
    weights["told"] = weights.pop("step_embedding")
    save_file(weights, checkpoint / "critic" / WEIGHTS)
    path = checkpoint / "optimizer-critic.pt"
    moments = torch.load(path, weights_only=True)

    def old(name: str) -> str:
        return name.replace("step_embedding", "told")

    moments["state"] = {old(name): value for name, value in moments["state"].items()}
    for group in moments["param_groups"]:
        group["params"] = [old(name) for name in group["params"]]
    torch.save(moments, path)


def test_a_checkpoint_of_before_goes_on_to_the_same_weights(tmp_path):
    torch.set_num_threads(1)
    fields = common(steps=4, checkpoint_every=2, batch=4, lr_schedule="constant", critic_warmup=0, warmup=0)
    recipe = recipes.changed(recipes.digits_dmd2(), **fields | dict(model="digits", teacher=""))
    execute(recipe, tmp_path / "straight")
    execute(recipes.changed(recipe, steps=2), tmp_path / "half", tmp_path / "run")
    (checkpoint,) = checkpoints.all_of(tmp_path / "run")
    as_before(checkpoint)
    execute(recipe, tmp_path / "resumed", tmp_path / "run")
    ours, theirs = (checkpoints.all_of(tmp_path / name)[-1] for name in ("run", "straight-run"))
    for name in ("generator", "generator_ema", "critic"):
        first, second = (load_file(path / name / WEIGHTS) for path in (ours, theirs))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name
    assert load_file(ours / "critic" / WEIGHTS)["step_embedding"].abs().max() > 0
    assert dataclasses.asdict(recipe)["mixed_steps"] and "phases" in json.loads((ours / "state.json").read_text())
