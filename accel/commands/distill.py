"""Train a small student, or fine-tune a pipeline: one sub-verb per method, one option per field of its recipe."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import Notice, UserError

from ..command_line.options import add_general
from ..command_line.parser import Parser, one_of, renamed

if TYPE_CHECKING:
    from accel.distill.registry import MethodEntry
    from accel.distill.settings import Recipe

EXAMPLE = "accel distill tiny --model digits --data digits --recipe digits_tiny --out my-tiny"
# Sampling steps are --steps in every verb, so these have another name on the command line.
_FLAGS = {"steps": "--train-steps"}


def add_arguments(parser: Any) -> None:
    from accel.distill.registry import METHODS

    methods = parser.add_subparsers(dest="method", metavar="METHOD", required=True, parser_class=Parser)
    for name, entry in METHODS.items():
        recipe = next((preset for preset in entry.presets.split() if preset.startswith("digits")), "")
        command = f"accel distill {name} --model digits --data digits"
        method = methods.add_parser(
            name,
            help=entry.help,
            description=entry.help,
            usage=f"accel distill {name} --model M --data D --out O [options]",
            example=f"{command} --recipe {recipe} --out my-{name}" if recipe else EXAMPLE,
        )
        method.add_options = partial(_add_options, method, name, entry)


def _add_options(parser: Parser, name: str, entry: MethodEntry) -> None:
    from accel.distill.registry import recipe_names

    text = "folder of the trained pipeline"
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", required=not entry.memory_estimate, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    text = "folder of checkpoints, losses and samples (default: OUT-run); kept to resume"
    parser.add_argument("--run", type=Path, metavar="DIR", help=text)
    names = recipe_names(name)
    parser.add_argument(
        "--recipe",
        type=one_of("recipe", names, lambda text: text.replace("-", "_")),
        metavar="NAME",
        help=f"named settings to start from, which other options override: {', '.join(names)}",
    )
    text = "put the result into this repository of the hub, which is made at the start; accel push does it later"
    parser.add_argument("--push", metavar="USER/NAME", help=text)
    text = "licence of the card, as the hub spells it: usually that of the model (the digits know theirs)"
    parser.add_argument("--license", metavar="ID", help=text)
    parser.add_argument("--private", action="store_true", default=None, help="let a new repository be private")
    parser.add_argument("--threads", type=int, metavar="N", help="number of CPU threads")
    if entry.memory_estimate:
        parser.add_argument(
            "--memory-estimate", action="store_true", help="print the memory that a run needs, and stop"
        )
        renamed(parser, "--plan", "--memory-estimate")
        text = "FSDP2 processes of the memory estimate (default: 1)"
        parser.add_argument("--processes", type=int, default=1, metavar="N", help=text)
    defaults = entry.settings()
    group = parser.add_argument_group("fields of the recipe")
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
        else:
            options["metavar"] = {int: "N", float: "X"}.get(type(default), "TEXT")
        flag = _FLAGS.get(field.name, "--" + field.name.replace("_", "-"))
        group.add_argument(flag, dest=field.name, help=text.replace("%", "%%"), **options)
    renamed(group, "--steps", _FLAGS["steps"])
    add_general(parser, json_help="print the training record as JSON")


def run(args: argparse.Namespace) -> int:
    from accel.distill import recipes, registry
    from accel.distill.run import execute

    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    settings = registry.recipe(args.recipe or args.method, args.method)
    named = registry.settled(args.method, (args.model or "").partition("/")[0] == "digits")
    if not args.recipe and named:
        text = f"accel distill {args.method} alone is a short run to try things with, not the published setting"
        warnings.warn(Notice(f"{text}: --recipe {' or '.join(named)}"), stacklevel=2)
    given = {
        field.name: value
        for field in dataclasses.fields(settings)
        if (value := getattr(args, field.name, None)) is not None
    }
    settings = recipes.changed(settings, **given)
    if getattr(args, "memory_estimate", False):
        return _print_memory_estimate(settings, args)
    if not args.out:
        raise UserError("no --out given", "--out FOLDER, or --memory-estimate to see what the run needs")
    if args.push:
        from ..publishing.trained import check_repository, licence_for

        licence_for(settings.model, args.license)
        check_repository(args.push, private=args.private)
    elif args.license or args.private:
        raise UserError("--license and --private are for --push", "--push USER/NAME, or leave them out")
    outcome = execute(settings, args.out, args.run, overwrite=args.overwrite)
    if outcome.stopped:
        return 130  # `execute` has said so
    if args.push:
        _push(args)
    if args.json:
        print(json.dumps(json.loads((args.out / "training.json").read_text()), indent=2))
    else:
        print(f"next{_next_command(args.out, args.model or 'MODEL')}")
    return 0


def _push(args: argparse.Namespace) -> None:
    """Of several processes the first one pushes."""
    import os

    from ..publishing.trained import push_trained

    if os.environ.get("RANK", "0") != "0":
        return
    try:
        done = push_trained(args.out, args.push, licence=args.license, private=args.private)
    except UserError as error:
        raise UserError(f"{args.out} is ready, but {error.message}", f"accel push {args.out} {args.push}") from None
    if not args.json:
        print(f"{done.url}: {len(done.files)} files")


def _next_command(out: Path, model: str) -> str:
    """How `accel export` takes a result: a pipeline, a LoRA or a VAE."""
    if (out / "model_index.json").is_file():
        return f": accel export {out} BUNDLE"
    parts = {"pytorch_lora_weights.safetensors": "lora", "config.json": "vae"}
    option = next((option for name, option in parts.items() if (out / name).is_file()), None)
    return f": accel export {model} BUNDLE --{option} {out}" if option else ""


def _print_memory_estimate(settings: Recipe, args: argparse.Namespace) -> int:
    from accel.distill.registry import entry_of, load
    from accel.distill.run import encoders_of, with_resolution

    if args.processes < 1:
        raise UserError(f"invalid processes: {args.processes} (expected an integer >= 1)", "--processes 1, or more")
    encoders = encoders_of(settings)
    settings = with_resolution(settings, encoders)
    memory = load(entry_of(settings).memory_estimate)(settings, encoders, shards=args.processes)
    if args.json:
        parts, parameters = dict(memory.parts), dict(memory.parameters)
        print(json.dumps({"peak_bytes": memory.peak, "parts": parts, "parameters": parameters, "how": memory.how}))
    else:
        print("\n".join(memory.lines()))
    return 0
