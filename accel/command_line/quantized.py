"""Options of quantization: which layers, how ranges are found, and what a number format has no use for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..dtypes import QUANTIZED
from ..errors import UserError
from ..int8.config import LEVELS, OBSERVERS
from ..int8.formats import BLOCKS, FORMATS
from .parser import renamed, several

# The options of `add_quantized`, as they are in the arguments.
GIVEN = "calibration calibration_images smooth budget sensitivity".split()
GIVEN += "int8_components int8_level int8_keep int8_observer weight_block".split()


def given(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The options among `names` that were given, as they are typed."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, [])]


def add_quantized(group: Any) -> None:
    """The options, in a group of the parser."""
    text = "file of prompts to calibrate on (default: built-in ones)"
    group.add_argument("--calibration", type=Path, metavar="FILE", help=text)
    text = "images to calibrate on (default: 32)"
    group.add_argument("--calibration-images", type=int, metavar="N", help=text)
    parts = ("unet", "text_encoder", "vae_decoder")
    text = f"components to quantize: {','.join(parts)} (default: all)"
    group.add_argument("--int8-components", type=several("component", parts), metavar="NAMES", help=text)
    group.add_argument(
        "--int8-level",
        choices=LEVELS,
        help="layers to quantize: conv, ff (+ feed-forward), qkv (+ queries, keys, values), all (default), scores "
        "(+ q k^T of self-attention) or attention (+ its softmax weights times v)",
    )
    group.add_argument(
        "--int8-keep",
        action="append",
        default=[],
        metavar="LAYER",
        help="layer or block of the UNet to leave in higher precision; takes * (repeatable)",
    )
    text = "how calibration chooses ranges (default: mse)"
    group.add_argument("--int8-observer", choices=OBSERVERS, help=text)
    renamed(group, "--collector", "--int8-observer")
    text = "inputs that share a scale, of int4 weights (default: 64)"
    group.add_argument("--weight-block", type=int, choices=BLOCKS, help=text)
    text = "SmoothQuant's alpha for linear layers, 0 to 1 (default: 0, none)"
    group.add_argument("--smooth", type=float, metavar="ALPHA", help=text)
    group.add_argument(
        "--budget",
        type=float,
        metavar="DB",
        help="least PSNR of images against float32: leave the most sensitive layers in higher precision until it holds",
    )
    text = "write a table of what each layer costs (Markdown and JSON)"
    group.add_argument("--sensitivity", type=Path, metavar="DIR", help=text)


def check_quantized(args: argparse.Namespace) -> None:
    """Refuse options that a number format has no use for, and an opset that cannot hold it."""
    form = FORMATS[QUANTIZED[args.precision][0]]
    unused = [] if form.activations else ["calibration_images", "smooth", "int8_observer"]
    if names := given(args, unused + ["weight_block"] * (not form.blocked)):
        what = "calibrates nothing" if not form.activations and names[0] != "--weight-block" else "has no blocks"
        raise UserError(
            f"{names[0]} does not go with --precision {args.precision}, which {what}", f"leave {names[0]} out"
        )
    if args.opset is not None and args.opset < form.opset:
        raise UserError(
            f"opset {args.opset} has no {args.precision}", f"--opset {form.opset} or later, or leave --opset out"
        )


def int8_settings(args: argparse.Namespace) -> Any:
    """The options of the int8 group, as `export_pipeline` takes them."""
    from accel.export.int8.settings import Int8Settings
    from accel.int8.config import Int8Config

    def those(**options: Any) -> dict[str, Any]:
        return {name: value for name, value in options.items() if value is not None}

    config = those(
        level=args.int8_level,
        keep=tuple(args.int8_keep) or None,
        observer=args.int8_observer,
        smooth=args.smooth,
        block=args.weight_block,
    )
    return Int8Settings(
        **those(
            config=Int8Config(**config) if config else None,
            prompts=args.calibration,
            images=args.calibration_images,
            budget=args.budget,
            sensitivity=args.sensitivity,
            components=args.int8_components,
        )
    )
