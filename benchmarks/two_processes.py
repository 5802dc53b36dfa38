"""Do two processes train as one does with the joint batch? Every method, by DDP and FSDP2, on networks in miniature.

    python benchmarks/two_processes.py            # measures, and prints the table of docs/distill.md
    python benchmarks/two_processes.py --page     # and puts it there

Three optimizer steps of 4 images, or of 2 images in each of 2 processes, under gloo on CPUs. AdamW's epsilon is 1: with
the usual one its first updates are as large as the learning rate however small the gradient, and make much of rounding.
FSDP2 is set as `accelerate launch` sets it, and every trained network is asserted to be sharded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pages import put
from safetensors.torch import load_file

from accel.distill import recipes, settings
from accel.distill.run import execute
from accel.distill.settings import Recipe
from accel.distill.training import checkpoints

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "distill.md"
STEPS = 3

_COMMON: dict[str, Any] = dict(
    data="digits",
    resolution=64,
    random_flip=False,
    cache="none",
    steps=STEPS,
    epsilon=1.0,
    weight_decay=0.0,
    learning_rate=0.1,
    ema=0.5,
    checkpoint_every=1,
    sample_every=2,  # the loop then reads networks between phases
    sample_steps=1,
    sample_prompts="a",
    validation_every=2,
    log="none",
)
_HELD_OUT = dict(validation=5)  # images, which two processes divide unevenly
_DMD2 = dict(few_steps=2, ratio=2, discriminator_weight=0.1)

# Title, which model, the recipe's class, its fields.
CASES: dict[str, tuple[str, type[Recipe], dict[str, Any]]] = {
    "kd": ("sd15", settings.DistillationRecipe, dict(student="tiny", **_HELD_OUT)),
    "finetune": ("small", settings.FinetuneRecipe, _HELD_OUT),
    "lora": ("small", settings.LoraRecipe, dict(rank=4, **_HELD_OUT)),
    "dmd2": ("small", settings.DMD2Recipe, dict(**_DMD2, adversarial_weight=0.0)),
    "dmd2, GAN": ("small", settings.DMD2Recipe, dict(**_DMD2, adversarial_weight=0.1)),
    "dmd2, GAN, EDM": ("edm", settings.DMD2Recipe, dict(resolution=16, real_guidance=1.0, **_DMD2 | dict(few_steps=1))),
    "dmd2, pair of LoRAs": ("small", settings.DMD2Recipe, dict(**_DMD2, rank=2, critic_rank=2)),
    "dmd2, GAN, bf16": (
        "small",
        settings.DMD2Recipe,
        dict(**_DMD2, adversarial_weight=0.1, mixed_precision="bf16", sample_every=0),
    ),
    "lcm": ("small", settings.LCMRecipe, dict(guidance=3.0, guidance_high=6.0, skip=200, loss="l2")),
    "regress": ("small", settings.RegressionRecipe, dict(pair_count=8, pair_steps=2)),
}
SHARED = ("dmd2, pair of LoRAs",)  # FSDP refuses what several updates share

RUN = """
import json, sys, torch
from pathlib import Path
from accelerate import Accelerator
from accel.distill import recipes, run, settings
torch.set_num_threads(1)
Accelerator.end_training = lambda self: None  # which would end the group of the next run
for name, kind, fields, out in json.loads(sys.argv[1]):
    run.execute(getattr(settings, kind)(**fields), Path(out))
"""


def recipe_of(name: str, models: Mapping[str, Path]) -> Recipe:
    model, kind, fields = CASES[name]
    made = kind(**_COMMON | fields, model=str(models[model]))
    return recipes.changed(made, pairs=str(models[model].with_name("pairs"))) if name == "regress" else made


def alone(models: Mapping[str, Path], folder: Path, names: Iterable[str] = CASES) -> None:
    """One process, batches of 4."""
    for name in names:
        execute(replace(recipe_of(name, models), batch=4), folder / name)


def together(
    models: Mapping[str, Path], folder: Path, launch: Callable[..., Any], names: list[str], **how: Any
) -> None:
    """Two processes, batches of 2; `launch` is `torchrun` of the tests."""
    asked = [
        (name, CASES[name][1].__name__, asdict(replace(recipe_of(name, models), batch=2)), str(folder / name))
        for name in names
    ]
    launch(RUN, json.dumps(asked), **how)


def differences(one: Path, two: Path) -> tuple[float, float]:
    """Of two runs of a method: the largest relative difference of a loss or a gradient norm, over all steps; and the
    difference of the weights at the end, as a share of how far they have moved since the first step."""
    logs = [[json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()] for run in (one, two)]
    figures = 0.0
    for ours, theirs in zip(*logs, strict=True):
        assert set(ours) == set(theirs), (set(ours), set(theirs))
        for name in set(ours) - {"seconds", "generator/lag"}:  # the lag is a ratio of a batch's means
            figures = max(figures, abs(ours[name] - theirs[name]) / max(abs(ours[name]), 1e-12))
    apart, moved = 0.0, 0.0
    first, last = (checkpoints.all_of(one)[at] for at in (0, -1))
    for path in last.glob("*/*.safetensors"):
        start, ours, theirs = (
            load_file(folder / path.relative_to(last)) for folder in (first, last, checkpoints.all_of(two)[-1])
        )
        apart += sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
        moved += sum(float((ours[name] - start[name]).double().square().sum()) for name in ours)
    return figures, math.sqrt(apart / moved)


def table(rows: Mapping[str, Mapping[str, tuple[float, float] | None]]) -> str:
    heads = [f"{wrapper}: {what}" for wrapper in ("DDP", "FSDP2") for what in ("losses, norms", "weights")]
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name, found in rows.items():
        cells = [
            f"{value:.1e}" if value is not None else "refused"
            for wrapper in ("DDP", "FSDP2")
            for value in found[wrapper] or (None, None)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def of_tests(path: str) -> Any:
    """A conftest of the tests, which makes the networks in miniature and starts processes."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / "tests" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_edm(folder: Path) -> Path:
    """An EDM model of ten classes, 16 px. An untrained network says 0 in many places: its weights are drawn."""
    from diffusers import UNet2DModel

    from accel.distill.edm import preconditioning
    from accel.distill.edm.source import save_edm

    config = dict(
        size=16, channels=1, width=32, multipliers=(1, 2), layers=1, attention=(8,), head_width=32, classes=10
    )
    torch.manual_seed(0)
    unet = UNet2DModel(**preconditioning.unet_config(**config))
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    folder.mkdir(parents=True)
    save_edm(folder, preconditioning.Preconditioned(unet))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="put the table into docs/distill.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "tests"))
    networks, processes = of_tests("conftest.py"), of_tests("distill/conftest.py")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {
            "sd15": networks.make_sd15(folder / "sd15"),
            "small": networks.make_small(folder / "small"),
            "edm": make_edm(folder / "edm"),
        }
        alone(models, folder / "one")
        ways = {"DDP": (list(CASES), False), "FSDP2": ([name for name in CASES if name not in SHARED], True)}
        for wrapper, (names, sharded) in ways.items():
            together(
                models, folder / wrapper, lambda *a, **k: processes.launch(folder, *a, **k), names, sharded=sharded
            )
        found = {
            case: {
                wrapper: differences(folder / "one" / f"{case}-run", folder / wrapper / f"{case}-run")
                if case in names
                else None
                for wrapper, (names, _) in ways.items()
            }
            for case in CASES
        }
    print(table(found))
    if args.page:
        put(PAGE, "two-processes", table(found))


if __name__ == "__main__":
    main()
