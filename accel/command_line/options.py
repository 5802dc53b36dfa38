"""Options that several verbs share: one name for one meaning, and what the verbs read out of them."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import UserError, printable, unknown
from ..progress import progress
from .parser import one_of, renamed


def add_general(parser: Any, *, json_help: str = "print the result as one JSON document") -> None:
    """`--json`, `--quiet` and `--verbose`, which every verb has."""
    group = parser.add_argument_group("messages")
    if "--json" not in parser._option_string_actions:
        group.add_argument("--json", action="store_true", help=json_help)
    group.add_argument("-q", "--quiet", action="store_true", help="show no progress and no notes")
    group.add_argument("-v", "--verbose", action="store_true", help="show the libraries' messages and full tracebacks")


def add_out(parser: Any, what: str, **options: Any) -> None:
    """`-o`/`--out` and `--overwrite`."""
    parser.add_argument("-o", "--out", help=what, **options)
    parser.add_argument("--overwrite", action="store_true", help="replace what is already there")


def add_prompts(parser: Any) -> None:
    """`-p`/`--prompt` and `--prompt-file`, see `prompts_of`."""
    parser.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="text of the image; repeatable")
    parser.add_argument("--prompt-file", metavar="FILE", help="file of prompts: one in a line, or .csv, .jsonl")


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts that were given, those of the file last; empty where none was given.

    Raises:
        UserError: for a prompt without text, or a file that cannot be read.
    """
    from ..text.prompt_files import read_prompts

    prompts = list(args.prompt or ())
    if args.prompt_file:
        prompts += read_prompts(Path(args.prompt_file))
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("the prompt is empty", 'describe the image: --prompt "a fox in the snow"')
    return prompts


def add_seed(parser: Any) -> None:
    text = "seed of the first image; the others count on (default: 0)"
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=text)


def add_size(parser: Any) -> None:
    for side in ("height", "width"):
        parser.add_argument(f"--{side}", type=int, metavar="PX", help="pixels (default: the model's own size)")


def add_sampling(parser: Any, *, whose: str = "the model's own", options: bool = True) -> None:
    """`--sampler`, `--steps` and `--guidance`.

    Args:
        whose: what holds where an option is not given.
        options: add the sampler's own options as well, see `sampler_options`.
    """
    from ..sampling.samplers import SAMPLERS

    text = f"{', '.join(SAMPLERS)} (default: {whose})"
    parser.add_argument("--sampler", type=one_of("sampler", SAMPLERS), metavar="NAME", help=text)
    parser.add_argument("--steps", type=int, metavar="N", help=f"sampling steps (default: {whose})")
    text = f"guidance scale; 0 or 1 for none (default: {whose})"
    parser.add_argument("--guidance", type=float, metavar="SCALE", help=text)
    if options:
        _add_sampler_options(parser)


def add_few_step(parser: Any) -> None:
    """`--few-step`, for verbs that take pipelines."""
    from ..models.few_step import names

    text = "sample as this kind of few-step model, where its files' names do not say it; none for an ordinary one"
    kind = one_of("few-step family", names())
    parser.add_argument("--few-step", type=kind, metavar="NAME", help=f"{text}: {', '.join(names())}")


def _add_sampler_options(parser: Any) -> None:
    """What may be said of a sampler beside its name and steps: `accel.sampling.constants.OPTIONS`."""
    from ..sampling.samplers import SIGMAS

    own = "(default: what the scheduler's config says)"
    names = (*SIGMAS, "none")
    text = f"spacing of the noise levels: {', '.join(names)} {own}"
    parser.add_argument("--sigmas", type=one_of("sigmas", names), metavar="NAME", help=text)
    names = ("leading", "trailing", "linspace")
    parser.add_argument("--timestep-spacing", choices=names, help=f"of the timesteps {own}")
    text = "noise in every step, 0 to 1: of ddim, and tcd's gamma (default: 0)"
    parser.add_argument("--eta", type=float, metavar="ETA", help=text)
    text = f"shift of the noise levels of a flow-matching model {own}"
    parser.add_argument("--shift", type=float, metavar="SHIFT", help=text)


def sampler_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a sampler that were given, by name."""
    from ..sampling.constants import OPTIONS

    return {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}


def add_engine(parser: Any) -> None:
    """`--engine`, and the options of the engines, each with the engines that take it."""
    from ..dtypes import SHORT
    from ..engines import ENGINES
    from ..engines.select import with_option

    group = parser.add_argument_group("engine")

    def add(flag: str, text: str, option: str = "", **options: Any) -> None:
        option = option or flag.removeprefix("--").replace("-", "_")
        group.add_argument(flag, dest=option, help=f"{text} ({', '.join(with_option(option))})", **options)

    names = ["auto", *reversed(ENGINES)]
    group.add_argument(
        "--engine",
        default="auto",
        type=_engine_name,
        metavar="NAME",
        help=f"what runs the networks: {', '.join(names)}; precision and device may follow, as in eager:bf16 "
        "(default: auto, the fastest that can run here)",
    )
    add("--device", "where to run: cpu, cuda or cuda:1; for openvino one of its own devices, such as GPU")
    add("--precision", "what to compute in, instead of the bundle's own", "dtype", choices=tuple(SHORT))
    renamed(group, "--dtype", "--precision")
    from ..attention import NAMES

    names = ", ".join(NAMES)
    add("--attention", f"kernel of the attention layers: {names}", type=one_of("attention", NAMES), metavar="NAME")
    add("--tf32", "let float32 compute in TF32 on a GPU", action="store_true", default=None)
    text = "memory layout of images in the networks: nchw, or nhwc (torch's channels_last)"
    add("--layout", text, choices=("nchw", "nhwc"))
    add("--provider", "execution provider: cpu, cuda, tensorrt, tensorrt-rtx, or NAME=PATH of a plugin", metavar="NAME")
    add("--cuda-graph", "replay captured CUDA graphs, of one step or of all steps", choices=("off", "step", "loop"))
    add("--engine-file", "key of the engine file to use, instead of the newest that fits", metavar="KEY")
    renamed(group, "--plan", "--engine-file")
    text = "let a version-compatible engine file run the runtime that it carries inside"
    add("--allow-host-code", text, action="store_true", default=None)
    add("--specialization", "kernels for the very shapes asked for", choices=("lazy", "eager", "none"))
    add("--threads", "number of CPU threads", type=int, metavar="N")


def _engine_name(text: str) -> str:
    from ..bench.variants import parse
    from ..engines import ENGINES

    if text.partition(":")[0] not in ("auto", *ENGINES):
        raise unknown("engine", text, ["auto", *reversed(ENGINES)])
    if ":" in text:
        parse(text)
    return text


def engine_of(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The engine's name, and the options that were given, by the names the engines use."""
    from ..bench.variants import parse

    torch = ("device", "dtype", "attention", "tf32", "layout")
    names = (*torch, "provider", "threads", "cuda_graph", "engine_file", "allow_host_code", "specialization")
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    name, _, suffix = args.engine.partition(":")
    return name, (parse(args.engine).options if suffix else {}) | given


def add_build(parser: Any) -> None:
    """The fields of `export.tensorrt.options.BuildOptions`, each as an option of its name, and `--targets`."""
    from ..trt.flavours import RTX

    parser.add_argument(
        "--targets",
        type=_names,
        default=(),
        metavar="NAMES",
        help=f"compute capabilities that engine files of {RTX.title} are for, with commas between them: "
        f"{', '.join(RTX.targets)} (default: Ampere and every later one)",
    )
    parser.add_argument(
        "--optimization-level", type=int, default=3, metavar="N", help="0 (fastest build) to 5 (longest search)"
    )
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


def add_gpu(parser: Any, text: str, *, cpu: bool = False) -> None:
    """`--device` of what runs on a GPU; `cpu`: takes cpu as well."""

    def device(name: str) -> str:
        from ..trt.cuda import index_of

        if name == "auto" or index_of(name) is None and not (cpu and name == "cpu"):
            raise UserError(f"{name!r} is not a CUDA device", "cuda, or cuda:1 for the second one")
        return name

    parser.add_argument("--device", type=device, metavar="DEVICE", help=f"{text} (default: cuda)")
    renamed(parser, "--gpu", "--device", given=lambda index: device(f"cuda:{index}"))


def build_device(args: argparse.Namespace) -> int | None:
    """The index of the GPU that was named to build on; None where none was."""
    from ..trt.cuda import index_of

    if args.device is None:
        return None
    if (index := index_of(args.device)) is None:
        fix = "--device cuda; or --engine tensorrt-rtx, or aoti"
        raise UserError("TensorRT engine files are built on a GPU", fix)
    return index


def _names(text: str) -> tuple[str, ...]:
    """ "sm86, sm89" -> ("sm86", "sm89")."""
    return tuple(name.strip().lower() for name in text.split(",") if name.strip())


def build_options(args: argparse.Namespace) -> Any:
    """The `BuildOptions` of `add_build`'s arguments."""
    from accel.export.tensorrt.options import BuildOptions

    return BuildOptions(**{field.name: getattr(args, field.name) for field in fields(BuildOptions)})


def build_engine_files(
    bundle: Any, args: argparse.Namespace, components: tuple[str, ...], profiles: list[str], engine: str
) -> list[Any]:
    """Build engine files of an engine with `add_build`'s arguments; shows progress and announcements on stderr."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with progress(console=console) as report:
        common: dict[str, Any] = dict(
            profiles=profiles,
            force=args.overwrite,
            progress=report,
            announce=lambda line: console.print(printable(line), markup=False),
        )
        if engine == "aoti":
            from accel.export.aoti.build import build as build_aoti

            refuse_tensorrts(args)
            return build_aoti(
                bundle, components, device=args.device or "auto", dtype=getattr(args, "dtype", None) or "auto", **common
            )
        from accel.export.tensorrt.build import build

        return build(
            bundle,
            components,
            engine=engine,
            targets=args.targets,
            options=build_options(args),
            device=build_device(args),
            **common,
        )


def refuse_tensorrts(args: argparse.Namespace) -> None:
    """Refuse what only TensorRT's builder takes."""
    options = build_options(args)
    given = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
    for name in [*given, *(["targets"] if args.targets else [])]:
        flag = "--no-timing-cache" if name == "timing_cache" else f"--{name.replace('_', '-')}"
        raise UserError(f"AOTInductor does not take {flag}: it is an option of TensorRT's builder", f"leave {flag} out")


def next_command(bundle: Any, how: str = "") -> str:
    """What to type next with a bundle that has just been written: how it is run, or why it makes no image."""
    from ..pipeline import component_names

    try:
        component_names(bundle)
    except UserError as error:
        return f", but makes no image by itself: {error.message} (accel.load_engine runs one component)"
    if not bundle.manifest.by_class:
        return f": accel run {bundle.name}{how} --prompt TEXT"
    return f": accel run {bundle.name}{how}" + (" --class 0" if bundle.manifest.pipeline["classes"] else "")


def size(text: str) -> int:
    """Bytes of `512M`, `2G` or a plain number."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        return int(float(number) * unit)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M or 2G") from None
