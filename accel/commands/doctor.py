"""`accel doctor`: check which engines run on this machine, which packages work, and how to fix the others."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..engines import ENGINES, status
from ..engines.attempt import attempt
from ..machine import version_of
from ..progress import progress

EXAMPLE = "accel doctor"


@dataclass(frozen=True)
class Package:
    """An optional package of the project.

    Attributes:
        module: what it is imported as.
        names: the distributions that bring it; the first one that is installed counts.
        use: what it is for.
        extra: the extra of accel-diffusion that brings it; "" for none.
        alone: whether two of its distributions overwrite each other's files.
    """

    module: str
    names: tuple[str, ...]
    use: str
    extra: str = ""
    alone: bool = False


PACKAGES = (
    Package("torch", ("torch",), "distill, export, engines eager and compile"),
    Package("diffusers", ("diffusers",), "pipelines"),
    Package("transformers", ("transformers",), "text encoders"),
    Package("accelerate", ("accelerate",), "training on several devices"),
    Package("onnx", ("onnx",), "graphs"),
    Package("onnxscript", ("onnxscript",), "export"),
    Package("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "engine onnxruntime", "cpu", alone=True),
    Package("openvino", ("openvino",), "engine openvino", "openvino"),
    Package("tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "engine tensorrt", "tensorrt"),
    Package("triton", ("triton",), "torch.compile on a GPU, kernels"),
    Package("flash_attn", ("flash-attn", "flash-attn-4"), "--attention flash-attn, flash-attn-4", "flash-attn"),
    Package("xformers", ("xformers",), "--attention xformers", "xformers"),
    Package("optimum", ("optimum",), "reading bundles with optimum", "optimum"),
    Package("bitsandbytes", ("bitsandbytes",), "training with --optimizer adamw8bit"),
    Package("peft", ("peft",), "LoRA training", "train"),
    Package("datasets", ("datasets",), "Hugging Face data sets", "train"),
    Package("sklearn", ("scikit-learn",), "training and evaluating digits", "train"),
    Package("skimage", ("scikit-image",), "--canny", "control"),
    Package("cleanfid", ("clean-fid",), "published FID protocols", "evaluate"),
)
# Imports one module after the other; a line for each, so that what came before a crash is known.
_IMPORTS = """
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        error = ""
    except BaseException as caught:
        error = f"{type(caught).__name__}: {(str(caught).strip().splitlines() or [''])[0][:200]}"
    print("\\n" + json.dumps([name, error]), flush=True)
"""


def add_arguments(parser: Any) -> None:
    text = "look at what is installed, without running the engines and importing the packages"
    parser.add_argument("--fast", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    report = examine(fast=args.fast)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if any(state["ok"] for state in report["engines"].values()) else 1


def examine(*, fast: bool = False) -> dict[str, Any]:
    """Look at this machine, and try what is there.

    Args:
        fast: do not try: believe what is installed.

    Returns:
        `engines` and `optional` ({name: {ok, detail, fix}}), `gpus`, `packages` ({name: version or None}), `machine`
        (`accel.machine.Machine`), `attention` (what torch may choose from on a GPU).
    """
    from ..machine import machine

    here, engines = machine(), {}
    with progress("doctor", shown=not fast) as report:
        for i, name in enumerate(ENGINES):
            report(f"trying {name}", i / (len(ENGINES) + 1))
            engines[name] = vars(status(name) if fast else attempt(name))
        report("importing the packages", len(ENGINES) / (len(ENGINES) + 1))
        packages = _packages(fast)
    return {
        "engines": engines,
        "optional": packages,
        "gpus": _gpus(),
        "attention": _attention(),
        "packages": here.packages,
        "machine": here.as_dict(),
    }


def _packages(fast: bool) -> dict[str, dict[str, Any]]:
    installed = [package.module for package in PACKAGES if _installed(package.module)]
    errors = dict.fromkeys(installed, "") if fast else _import(installed)
    found = {}
    for package in PACKAGES:
        versions = [f"{name} {version}" for name in package.names if (version := version_of(name))]
        name = versions[0].partition(" ")[0] if versions else package.names[0]
        detail, fix = f"{', '.join(versions) or 'installed'}: {package.use}", ""
        error = errors.get(package.module, "missing")
        if package.module not in errors:
            detail = f"not installed: {package.use}"
            fix = f'pip install "accel-diffusion[{package.extra}]"' if package.extra else f"pip install {name}"
        elif error:
            detail, fix = f"{detail}; but importing it fails: {error}", f"pip install --force-reinstall {name}"
        elif package.alone and len(versions) > 1:
            error = "both"
            detail = f"{' and '.join(versions)} overwrite each other's files"
            fix = f"pip uninstall {' '.join(package.names)}, then install the one you want again"
        found[name] = {"ok": not error, "detail": detail, "fix": fix}
    return found


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a test double, or half of a package
        return module in sys.modules


def _import(modules: list[str]) -> dict[str, str]:
    """Module -> why importing it fails; "" where it works. In a process of its own: a broken library may crash it."""
    found: dict[str, str] = {}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    while rest := [name for name in modules if name not in found]:
        command = [sys.executable, "-W", "ignore", "-c", _IMPORTS, *rest]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        found |= dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))
        if (crashed := next((name for name in rest if name not in found), None)) is not None:
            found[crashed] = f"the process ends with code {done.returncode}"
    return found


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


def _print(report: dict[str, Any]) -> None:
    for title, key in (("engines", "engines"), ("packages", "optional")):
        print(f"{title}:")
        for name, state in report[key].items():
            print(f"  {'yes' if state['ok'] else 'no '}  {name:<13} {state['detail']}")
            if state["fix"]:
                print(f"                     fix: {state['fix']}")
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
