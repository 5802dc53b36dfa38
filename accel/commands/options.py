"""Options that several verbs share."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .. import interrupt
from ..errors import Notice


def renamed(parser: argparse.ArgumentParser, old: str, new: str) -> None:
    """Accept an option's old name as well: absent from the help, and answered with a note.

    Args:
        new: its name now, such as "--engine-file"; an option that the parser has already and that may be left out.
    """
    option = parser._option_string_actions[new]

    class Renamed(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            warnings.warn(f"{old} is now {new}", Notice, stacklevel=2)
            option(parser, namespace, values, new)

    same = {name: getattr(option, name) for name in ("dest", "nargs", "type", "choices", "metavar")}
    parser.add_argument(old, action=Renamed, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **same)


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine", default="auto", help="auto, eager, compile, onnxruntime, openvino, tensorrt (default: auto)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1; an OpenVINO device (openvino)")
    parser.add_argument("--dtype", help="compute in fp32, bf16 or fp16 instead of the bundle's own (torch, openvino)")
    parser.add_argument("--provider", help="cpu, cuda or tensorrt (onnxruntime)")
    parser.add_argument("--cuda-graph", choices=("off", "step", "loop"), help="replay captured CUDA graphs (tensorrt)")
    parser.add_argument("--engine-file", metavar="KEY", help="TensorRT engine file (default: the newest that fits)")
    renamed(parser, "--plan", "--engine-file")
    parser.add_argument(
        "--allow-host-code",
        action="store_true",
        default=None,
        help="let a version-compatible TensorRT engine run the runtime inside its file",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (onnxruntime, openvino)")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given, by the names the engines use."""
    return {
        name: getattr(args, name)
        for name in ("device", "dtype", "provider", "threads", "cuda_graph", "engine_file", "allow_host_code")
        if getattr(args, name, None) is not None
    }


def add_sampling(parser: argparse.ArgumentParser) -> None:
    from ..sampling.samplers import SAMPLERS

    parser.add_argument("--sampler", help=f"{', '.join(SAMPLERS)} (default: the bundle's own)")
    parser.add_argument("--steps", type=int, help="number of steps (default: the bundle's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 0 or 1 for none (default: the bundle's own)")


def add_build(parser: argparse.ArgumentParser) -> None:
    """The fields of `export.tensorrt.build.BuildOptions`, each as an option of its name; and `--gpu`."""
    parser.add_argument("--optimization-level", type=int, default=3, help="0 (fastest build) to 5 (longest search)")
    parser.add_argument("--tf32", action="store_true", help="let float32 layers compute in TF32")
    parser.add_argument("--workspace", type=size, metavar="SIZE", help="limit of the workspace memory pool, such as 2G")
    parser.add_argument("--no-timing-cache", dest="timing_cache", action="store_false", help="time every kernel again")
    parser.add_argument("--refittable", action="store_true", help="let weights be refitted after the build (LoRA)")
    parser.add_argument("--version-compatible", action="store_true", help="run on later TensorRT too; may be slower")
    parser.add_argument(
        "--hardware-compatible",
        default="none",
        choices=("none", "ampere_plus", "same_compute_capability"),
        help="hardware compatibility level: run on other GPUs too; may be slower (default: none)",
    )
    parser.add_argument(
        "--strip-plan", action="store_true", help="leave weights out; loading refits them from the bundle"
    )
    parser.add_argument("--weight-streaming", action="store_true", help="let weights stay in host memory")
    parser.add_argument("--gpu", type=int, default=0, help="index of the GPU to build on and for (default: 0)")


def build_options(args: argparse.Namespace) -> Any:
    """The `BuildOptions` of `add_build`'s arguments."""
    from accel.export.tensorrt.build import BuildOptions

    return BuildOptions(**{field.name: getattr(args, field.name) for field in fields(BuildOptions)})


def build_engine_files(
    bundle: Any, args: argparse.Namespace, components: tuple[str, ...], profiles: list[str]
) -> list[Any]:
    """Build engine files with `add_build`'s arguments; shows a progress bar and announcements on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from accel.export.tensorrt.build import build

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    columns = (TextColumn("{task.description:<48}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        return build(
            bundle,
            components,
            profiles=profiles,
            options=build_options(args),
            device=args.gpu,
            force=getattr(args, "force", False),
            progress=stages(bar, task),
            announce=console.print,
        )


def size(text: str) -> int:
    """Bytes of `512M`, `2G` or a plain number."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        return int(float(number) * unit)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 512M or 2G") from None


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document for machines")


def stages(bar: Any, task: Any, prefix: str = "") -> Callable[[str, float], None]:
    """A progress callback that moves a rich progress bar and is where a lost Ctrl-C is found again."""

    def report(stage: str, fraction: float) -> None:
        interrupt.check()
        bar.update(task, description=prefix + stage, completed=fraction)

    return report
