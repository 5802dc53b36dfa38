"""Train a small student, or train a pipeline on: one method per sub-verb, its options made from the recipe's fields."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from pathlib import Path
from typing import Any

EXAMPLE = "accel distill tiny --model runwayml/stable-diffusion-v1-5 --data photos/ --recipe sd15_tiny --out my-tiny"

# Sub-verb -> the recipe its defaults come from.
METHODS = {
    "base": "SD1.x or SD2.x without one layer of each stage (BK-SDM-Base, Segmind's SD-Small)",
    "small": "base without the mid block (BK-SDM-Small)",
    "tiny": "small without the fourth stage (BK-SDM-Tiny, Segmind's SD-Tiny)",
    "ssd-1b": "SDXL with SSD-1B's transformer depths",
    "vega": "SDXL with Segmind-Vega's transformer depths",
    "dmd2": "a student of few steps, by distribution matching and a discriminator (DMD2)",
    "regress": "warm a one-step student up on the teacher's own images",
    "finetune": "train the UNet of any pipeline on",
    "lora": "train a LoRA of any pipeline: a small file of low-rank updates",
    "dreambooth": "teach any pipeline a subject from a few images",
    "vae": "a tiny VAE that stands in for a pipeline's own, whose decoder costs most of a few-step image",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    methods = parser.add_subparsers(dest="method", metavar="METHOD", required=True, parser_class=_Parser)
    for name, text in METHODS.items():
        method = methods.add_parser(
            name,
            help=text,
            description=text,
            usage=f"accel distill {name} --model M --data D --out O [options]",
            epilog=f"example: {EXAMPLE.replace('tiny', name)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        _add_method(method, name)


class _Parser(argparse.ArgumentParser):
    """Says which option was probably meant."""

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
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


def _add_method(parser: argparse.ArgumentParser, name: str) -> None:
    from accel.distill.recipes import recipe

    parser.add_argument("--out", required=name != "dmd2", type=Path, help="folder to write the trained pipeline to")
    parser.add_argument("--run", type=Path, help="checkpoints, losses, samples (default: OUT-run); kept to resume")
    parser.add_argument("--recipe", help="named settings to start from; options given here override its fields")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--threads", type=int, help="CPU threads")
    if name == "dmd2":
        parser.add_argument("--plan", action="store_true", help="print the memory that the run would need, and stop")
        parser.add_argument("--processes", type=int, default=1, help="FSDP2 processes that --plan divides by")
    parser.add_argument("--json", action="store_true", help="print the training record as JSON")
    for field in dataclasses.fields(recipe(name)):
        if field.name == "student":
            continue  # the sub-verb says it
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        default = getattr(recipe(name), field.name)
        text += f" (default: {default})" if default != "" and "default" not in text else ""
        kind = type(default)
        options: dict[str, Any] = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
        parser.add_argument(flag, default=None, help=text.replace("%", "%%"), **options)


def run(args: argparse.Namespace) -> int:
    from accel.distill import recipes
    from accel.distill.run import execute
    from accel.errors import UserError

    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    settings = recipes.recipe(args.recipe or args.method)
    own = recipes.recipe(args.method)
    if type(settings) is not type(own) or getattr(settings, "student", None) != getattr(own, "student", None):
        raise UserError(f"recipe {args.recipe} is not one of {args.method}", f"one of: {', '.join(_recipes(own))}")
    given = {
        field.name: value
        for field in dataclasses.fields(settings)
        if (value := getattr(args, field.name, None)) is not None
    }
    settings = recipes.changed(settings, **given)
    if getattr(args, "plan", False):
        return _plan(settings, args)
    if not args.out:
        raise UserError("no --out given", "--out FOLDER, or --plan to see what the run needs")
    outcome = execute(settings, args.out, args.run, overwrite=args.overwrite)
    if outcome.stopped:
        print(f"stopped after step {outcome.steps}; the same command goes on from there", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(json.loads((args.out / "training.json").read_text()), indent=2))
    else:
        whole = (args.out / "model_index.json").is_file()
        option = "" if whole else f" --{'vae' if args.method == 'vae' else 'lora'} {args.out}"
        print(f"{args.out} is ready: accel export {args.out if whole else args.model or 'MODEL'} BUNDLE{option}")
    return 0


def _plan(settings: Any, args: argparse.Namespace) -> int:
    from accel.distill.few_step.memory import predict
    from accel.distill.run import encoders_of
    from accel.errors import UserError

    if args.processes < 1:
        raise UserError(f"{args.processes} processes make no sense", "--processes 1, or more")
    plan = predict(settings, encoders_of(settings), shards=args.processes)
    if args.json:
        print(json.dumps({"peak_bytes": plan.peak, "parts": dict(plan.parts), "parameters": dict(plan.parameters)}))
    else:
        print("\n".join(plan.lines()))
    return 0


def _recipes(own: Any) -> list[str]:
    """Names of the recipes of the same method and student."""
    from accel.distill.recipes import RECIPES

    student = getattr(own, "student", None)
    return [
        name
        for name, made in RECIPES.items()
        if type(made()) is type(own) and getattr(made(), "student", None) == student
    ]
