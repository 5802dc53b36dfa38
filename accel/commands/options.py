"""Options that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .. import interrupt


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", default="auto", help="auto, eager, compile, onnxruntime, openvino (default: auto)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (eager, compile); an OpenVINO device (openvino)")
    parser.add_argument("--dtype", help="compute in fp32, bf16 or fp16 instead of the bundle's own (torch, openvino)")
    parser.add_argument("--provider", help="cpu, cuda or tensorrt (onnxruntime)")
    parser.add_argument("--threads", type=int, help="CPU threads (onnxruntime, openvino)")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given, by the names the engines use."""
    return {
        name: getattr(args, name)
        for name in ("device", "dtype", "provider", "threads")
        if getattr(args, name, None) is not None
    }


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampler", help="dmd2, dpmpp_2m, ddim or euler (default: the bundle's own)")
    parser.add_argument("--steps", type=int, help="number of steps (default: the bundle's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 0 or 1 for none (default: the bundle's own)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document for machines")


def stages(bar: Any, task: Any, prefix: str = "") -> Callable[[str, float], None]:
    """A progress callback that moves a rich progress bar and is where a lost Ctrl-C is found again."""

    def report(stage: str, fraction: float) -> None:
        interrupt.check()
        bar.update(task, description=prefix + stage, completed=fraction)

    return report
