"""Which settings of training go together: every method, with each pair of the other choices, on networks in miniature.

    python benchmarks/training_matrix.py            # runs them, and prints the table of docs/distill.md
    python benchmarks/training_matrix.py --page     # and puts it there

Each run makes two steps on a CPU. It ends with finite losses and a result, or it is refused with a reason before any
work; anything else is an error here. The rows cover every pair of two choices, not all products (which would be 576
runs, or 1,152 with `--compile`). `torch.compile` takes minutes a row, so it is left out unless `--compile` asks for it;
it runs with its `aot_eager` backend then: what breaks is tracing, not the code generator.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pages import put
from two_processes import make_edm, of_tests

from accel.distill import settings
from accel.distill.run import execute
from accel.errors import Notice, UserError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "distill.md"

_COMMON: dict[str, Any] = dict(
    data="digits",
    cache="none",
    steps=2,
    batch=2,
    log="none",
    checkpoint_every=2,
    sample_every=2,
    sample_steps=1,
    sample_prompts="a",
)
_DMD2 = dict(few_steps=1, ratio=1)
# Title -> model, class of the settings, fields.
METHODS: dict[str, tuple[str, type[settings.Recipe], dict[str, Any]]] = {
    "kd": ("sd15", settings.DistillationRecipe, dict(student="tiny")),
    "finetune": ("small", settings.FinetuneRecipe, dict(text_encoder=True)),
    "lora": ("small", settings.LoraRecipe, dict(rank=2)),
    "dmd2": ("small", settings.DMD2Recipe, _DMD2),
    "dmd2, pair of LoRAs": ("small", settings.DMD2Recipe, dict(**_DMD2, rank=2, critic_rank=2)),
    "dmd2, EDM": ("edm", settings.DMD2Recipe, dict(**_DMD2, real_guidance=1.0)),
    "lcm": ("small", settings.LCMRecipe, {}),
    "regress": ("small", settings.RegressionRecipe, dict(pair_count=2, pair_steps=1)),
    "vae": ("small", settings.TinyVaeRecipe, dict(width=8, blocks=1)),
}
AXES: dict[str, tuple[Any, ...]] = {
    "method": tuple(METHODS),
    "mixed_precision": ("no", "bf16", "fp16"),
    "gradient_checkpointing": (False, True),
    "qat": ("", "all", "attention"),
    "attention": ("auto", "sdpa", "xformers", "flash-attn"),
}


def pairwise(axes: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Rows in which every two values of different axes meet, each chosen to bring the most pairs that are missing."""
    names = list(axes)
    rows = [dict(zip(names, values, strict=True)) for values in itertools.product(*axes.values())]
    pairs = {id(row): set(itertools.combinations(row.items(), 2)) for row in rows}
    missing = set().union(*pairs.values())
    while missing:
        best = max(rows, key=lambda row: len(pairs[id(row)] & missing))
        missing -= pairs[id(best)]
        yield best


def outcome(choice: Mapping[str, Any], models: Mapping[str, Path], folder: Path) -> str:
    """ "runs", or why it is refused.

    Raises:
        AssertionError: for a refusal after work was done, or a run without a result.
    """
    model, kind, fields = METHODS[choice["method"]]
    options = {name: value for name, value in choice.items() if name != "method"}
    recipe = kind(**_COMMON | fields | options, model=str(models[model]))
    run = folder.with_name(f"{folder.name}-run")
    try:
        execute(recipe, folder)
    except UserError as error:
        begun = [path.name for path in run.glob("*")] if run.exists() else []
        assert not begun, (choice, error.message, begun)
        return error.message
    losses = [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(math.isfinite(v) for line in losses for v in line.values() if v is not None), choice
    assert (folder / "training.json").is_file()
    return "runs"


def outcomes(
    models: Mapping[str, Path], folder: Path, axes: Mapping[str, tuple[Any, ...]] = AXES
) -> list[tuple[dict[str, Any], str]]:
    """Every row with its outcome."""
    compiled = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, *args, **options: compiled(self, backend="aot_eager", dynamic=False)
    try:
        found = []
        for number, choice in enumerate(pairwise(axes)):
            torch._dynamo.reset()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Notice)
                found.append((choice, outcome(choice, models, folder / f"{number:02d}")))
            print(number, choice, found[-1][1], file=sys.stderr, flush=True)
        return found
    finally:
        torch.nn.Module.compile = compiled


def table(found: list[tuple[dict[str, Any], str]]) -> str:
    words = {"mixed_precision": "precision", "gradient_checkpointing": "checkpointing", "qat": "QAT"}
    heads = [*(words.get(name, name) for name in found[0][0]), "outcome"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for choice, said in sorted(found, key=lambda one: (list(METHODS).index(one[0]["method"]), one[1] != "runs")):
        cells = ["yes" if value is True else value or "" for value in choice.values()]
        lines.append(f"| {' | '.join(cells)} | {said if said == 'runs' else 'refused: ' + said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="put the table into docs/distill.md")
    parser.add_argument("--compile", action="store_true", help="torch.compile as one more choice; takes an hour")
    args = parser.parse_args()
    torch.set_num_threads(1)
    networks = of_tests("conftest.py")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {
            "sd15": networks.make_sd15(folder / "sd15"),
            "small": networks.make_small(folder / "small"),
            "edm": make_edm(folder / "edm"),
        }
        found = outcomes(models, folder, AXES | ({"compile": (False, True)} if args.compile else {}))
    print(table(found))
    if args.page:
        put(PAGE, "training-matrix", table(found))


if __name__ == "__main__":
    main()
