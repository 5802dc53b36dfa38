"""Train a small student, or fine-tune a pipeline: one sub-verb per method, one option per field of its recipe."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import Notice, UserError

if TYPE_CHECKING:
    from accel.distill.registry import MethodEntry
    from accel.distill.settings import Recipe

EXAMPLE = "accel distill tiny --model runwayml/stable-diffusion-v1-5 --data photos/ --recipe sd15_tiny --out my-tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from accel.distill.registry import METHODS

    methods = parser.add_subparsers(dest="method", metavar="METHOD", required=True, parser_class=_Parser)
    for name, entry in METHODS.items():
        method = methods.add_parser(
            name,
            help=entry.help,
            description=entry.help,
            usage=f"accel distill {name} --model M --data D --out O [options]",
            epilog=f"example: {EXAMPLE.replace('tiny', name)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        method.add_options = partial(_add_options, method, name, entry)


class _Parser(argparse.ArgumentParser):
    """Gets its options when it is chosen, and suggests the nearest one for a misspelt one."""

    add_options: Callable[[], None] | None = None

    def error(self, message: str) -> Any:
        known = [text.lstrip("-") for action in self._actions for text in action.option_strings if text[:2] == "--"]
        for word in message.replace("unrecognized arguments:", "").split():
            near = difflib.get_close_matches(word.lstrip("-").split("=")[0], known, 1)
            if "unrecognized" in message and word.startswith("--"):
                message += f"\n  did you mean --{near[0]}?" if near else ""
                message += f"\n  options: {', '.join('--' + name for name in known)}"
                break
        super().error(message)

    def parse_known_args(self, args=None, namespace=None):
        if self.add_options:
            self.add_options()
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


def _add_options(parser: argparse.ArgumentParser, name: str, entry: MethodEntry) -> None:
    parser.add_argument("--out", type=Path, required=not entry.memory_estimate, help="folder of the trained pipeline")
    parser.add_argument(
        "--run", type=Path, help="folder of checkpoints, losses and samples (default: OUT-run); kept to resume"
    )
    parser.add_argument("--recipe", help="named settings to start from; other options override its fields")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--threads", type=int, help="CPU threads")
    if entry.memory_estimate:
        parser.add_argument(
            "--memory-estimate", action="store_true", help="print the memory that a run needs, and stop"
        )
        parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)  # its name until 0.2
        parser.add_argument("--processes", type=int, default=1, help="FSDP2 processes of the memory estimate")
    parser.add_argument("--json", action="store_true", help="print the training record as JSON")
    defaults = entry.settings()
    for field in dataclasses.fields(defaults):
        if field.name == "student":
            continue  # the sub-verb says it
        text, default, choices = field.metadata["help"], getattr(defaults, field.name), field.metadata["choices"]
        text += f" (default: {default})" if default != "" and "default" not in text else ""
        options: dict[str, Any] = dict(type=type(default), choices=choices)
        if isinstance(default, bool):
            options = dict(action=argparse.BooleanOptionalAction)
        elif choices:
            options["metavar"] = "{" + ",".join(filter(None, choices)) + "}"
        parser.add_argument("--" + field.name.replace("_", "-"), help=text.replace("%", "%%"), **options)


def run(args: argparse.Namespace) -> int:
    from accel.distill import recipes, registry
    from accel.distill.run import execute

    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    settings = registry.recipe(args.recipe or args.method, args.method)
    given = {
        field.name: value
        for field in dataclasses.fields(settings)
        if (value := getattr(args, field.name, None)) is not None
    }
    settings = recipes.changed(settings, **given)
    if getattr(args, "plan", False):
        warnings.warn(Notice("--plan is now called --memory-estimate"), stacklevel=2)
    if getattr(args, "memory_estimate", False) or getattr(args, "plan", False):
        return _print_memory_estimate(settings, args)
    if not args.out:
        raise UserError("no --out given", "--out FOLDER, or --memory-estimate to see what the run needs")
    outcome = execute(settings, args.out, args.run, overwrite=args.overwrite)
    if outcome.stopped:
        print(f"stopped after step {outcome.steps}; the same command goes on from there", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(json.loads((args.out / "training.json").read_text()), indent=2))
    else:
        print(f"{args.out} is ready{_next_command(args.out, args.model or 'MODEL')}")
    return 0


def _next_command(out: Path, model: str) -> str:
    """How `accel export` takes a result: a pipeline, a LoRA or a VAE."""
    if (out / "model_index.json").is_file():
        return f": accel export {out} BUNDLE"
    parts = {"pytorch_lora_weights.safetensors": "lora", "config.json": "vae"}
    option = next((option for name, option in parts.items() if (out / name).is_file()), None)
    return f": accel export {model} BUNDLE --{option} {out}" if option else ""


def _print_memory_estimate(settings: Recipe, args: argparse.Namespace) -> int:
    from accel.distill.registry import entry_of, load
    from accel.distill.run import encoders_of

    if args.processes < 1:
        raise UserError(f"invalid processes: {args.processes} (expected an integer >= 1)", "--processes 1, or more")
    memory = load(entry_of(settings).memory_estimate)(settings, encoders_of(settings), shards=args.processes)
    if args.json:
        parts, parameters = dict(memory.parts), dict(memory.parameters)
        print(json.dumps({"peak_bytes": memory.peak, "parts": parts, "parameters": parameters}))
    else:
        print("\n".join(memory.lines()))
    return 0
