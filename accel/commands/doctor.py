"""`accel doctor`: check which engines run on this machine, and how to fix the others."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from typing import Any

from ..engines import ENGINES, status
from .options import add_json

EXAMPLE = "accel doctor"

_OPTIONAL = {"sklearn": ("training and evaluating the digits model", "train")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for title in ("engines", "optional"):
            print(f"{title}:")
            for name, state in report[title].items():
                mark = "yes" if state["ok"] else "no "
                fix = f"\n                     fix: {state['fix']}" if state["fix"] else ""
                print(f"  {mark}  {name:<13} {state['detail']}{fix}")
        print("GPUs:" if report["gpus"] else "GPUs: none that torch can see")
        for gpu in report["gpus"]:
            print(f"  {gpu}")
        if report["attention"]:
            print(f"attention: torch chooses among {', '.join(report['attention'])}")
        machine = report["machine"]
        print(
            f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, "
            f"{' '.join(machine['isa'])}; {machine['os']}, Python {machine['python']}"
        )
        print("packages: " + ", ".join(f"{name} {v}" for name, v in report["packages"].items() if v))
    return 0 if any(state["ok"] for state in report["engines"].values()) else 1


def examine() -> dict[str, Any]:
    """Look at this machine. Imports torch only to ask for GPUs.

    Returns:
        `engines` and `optional` ({name: {ok, detail, fix}}), `gpus`, `packages` ({name: version or None}), `machine`
        (`accel.machine.Machine`), `attention` (what torch may choose from on a GPU).
    """
    from ..machine import machine

    here = machine()
    return {
        "engines": {name: vars(status(name)) for name in ENGINES},
        "optional": {
            name: {
                "ok": find_spec(name) is not None,
                "detail": what,
                "fix": "" if find_spec(name) else f'pip install "accel-diffusion[{extra}]"',
            }
            for name, (what, extra) in _OPTIONAL.items()
        },
        "gpus": _gpus(),
        "attention": _attention(),
        "packages": here.packages,
        "machine": here.as_dict(),
    }


def _gpus() -> list[str]:
    if find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    return [
        f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        for p in (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    ]


def _attention() -> list[str]:
    """The scaled-dot-product backends that torch may choose from on a CUDA device; none without one."""
    if not _gpus():
        return []
    from torch.backends import cuda

    backends = {
        "flash": cuda.flash_sdp_enabled,
        "efficient": cuda.mem_efficient_sdp_enabled,
        "cudnn": cuda.cudnn_sdp_enabled,
        "math": cuda.math_sdp_enabled,
    }
    return [name for name, enabled in backends.items() if enabled()]
