"""Options that several verbs share."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import fields
from typing import Any

from ..errors import Notice
from ..progress import progress


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
    """`--engine`, and the options of the engines, each with the engines that take it."""
    from ..dtypes import SHORT
    from ..engines import ENGINES
    from ..engines.select import with_option

    def add(flag: str, text: str, **options: Any) -> None:
        takers = ", ".join(with_option(flag.removeprefix("--").replace("-", "_")))
        parser.add_argument(flag, help=f"{text} ({takers})", **options)

    names = ", ".join(["auto", *reversed(ENGINES)])
    parser.add_argument("--engine", default="auto", help=f"what runs the networks: {names} (default: auto)")
    add("--device", "where to run: cpu, cuda or cuda:1; for openvino one of its own devices, such as GPU")
    add("--dtype", f"dtype to compute in, instead of the bundle's own: {', '.join(SHORT)}")
    add("--provider", "execution provider: cpu, cuda or tensorrt")
    add("--cuda-graph", "replay captured CUDA graphs, of one step or of all steps", choices=("off", "step", "loop"))
    add("--engine-file", "key of the engine file to use, instead of the newest that fits", metavar="KEY")
    renamed(parser, "--plan", "--engine-file")
    text = "let a version-compatible engine file run the runtime that it carries inside"
    add("--allow-host-code", text, action="store_true", default=None)
    add("--threads", "number of CPU threads", type=int)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given, by the names the engines use."""
    return {
        name: getattr(args, name)
        for name in ("device", "dtype", "provider", "threads", "cuda_graph", "engine_file", "allow_host_code")
        if getattr(args, name, None) is not None
    }


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampler", help=f"{sampler_names()} (default: the bundle's own)")
    parser.add_argument("--steps", type=int, help="number of sampling steps (default: the bundle's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 0 or 1 for none (default: the bundle's own)")
    add_sampler_options(parser)


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """What may be said of a sampler beside its name and steps: `accel.sampling.constants.OPTIONS`."""
    from ..sampling.samplers import SIGMAS

    own = "(default: what the scheduler's config says)"
    names = ", ".join([*SIGMAS, "none"])
    parser.add_argument("--sigmas", help=f"spacing of the noise levels: {names} {own}")
    parser.add_argument("--timestep-spacing", help=f"leading, trailing or linspace {own}")
    parser.add_argument("--eta", type=float, help="noise in every step, 0 to 1: of ddim, and tcd's gamma (default: 0)")
    parser.add_argument("--shift", type=float, help=f"shift of the noise levels of a flow-matching model {own}")


def sampler_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_sampler_options` that were given."""
    from ..sampling.constants import OPTIONS

    return {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}


def sampler_names(*others: str) -> str:
    """The samplers as a help text lists them."""
    from ..sampling.samplers import SAMPLERS

    return ", ".join([*SAMPLERS, *others])


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

    from accel.export.tensorrt.build import build

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with progress(console=console) as report:
        return build(
            bundle,
            components,
            profiles=profiles,
            options=build_options(args),
            device=args.gpu,
            force=getattr(args, "force", False),
            progress=report,
            announce=console.print,
        )


def size(text: str) -> int:
    """Bytes of `512M`, `2G` or a plain number."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        return int(float(number) * unit)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M or 2G") from None


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
