"""Export a diffusers pipeline to a bundle."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from ..bundle import is_bundle
from ..errors import Notice
from ..int8 import summary
from ..progress import progress
from .options import add_build, add_sampler_options, build_engine_files, build_options, sampler_names, sampler_options

EXAMPLE = "accel export my-pipeline my-bundle --precision fp16 --profile sd-512"
# Options that export a pipeline, and options of int8. Those that are not given are None or empty.
_OF_PIPELINES = "lora unet vae adapter controlnet base variant sampler steps guidance profile opset components".split()
_OF_PIPELINES += "few_step sigmas timestep_spacing eta shift".split()
_OF_INT8 = "calibration calibration_images smooth budget sensitivity".split()
_OF_INT8 += "int8_components int8_level int8_keep int8_observer".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..bundle.shape_profiles import PROFILES

    parser.add_argument(
        "model",
        help="a diffusers pipeline folder, a hub id, or a single .safetensors checkpoint; for int8 a bundle too",
    )
    parser.add_argument("out", help="the bundle to write; it appears only when everything has succeeded")
    parser.add_argument(
        "--precision",
        default="fp32",
        help="fp32, fp16, int8, int8-fp16 (for a GPU), or auto: int8 where it is faster and within the parity budget "
        "(default: fp32)",
    )
    parser.add_argument(
        "--profile",
        help="shapes to accept: native (batch 1-4 at the model's own size), static (batch 1), "
        f"{', '.join(PROFILES)}; or spelled out: batch=1-4,height=256-768,width=512 (default: native)",
    )
    parser.add_argument("--opset", type=int, help="ONNX opset, 18 to 24 (default: 20)")
    parser.add_argument(
        "--components", help="comma-separated: text_encoder,unet,vae_decoder,vae_encoder (default: all of them)"
    )
    parser.add_argument(
        "--adapter",
        nargs="?",
        const=True,
        metavar="FOLDER",
        help="T2I-Adapter to export with it; without a folder, the UNet gets its inputs alone",
    )
    parser.add_argument("--controlnet", metavar="FOLDER", help="ControlNet to export with it")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[=SCALE]",
        help="LoRA to fuse into the weights, diffusers' or kohya's (repeatable; default scale: 1)",
    )
    parser.add_argument(
        "--unet", metavar="FILE", help="UNet weights instead of the model's own, such as dmd2_sdxl_4step_unet_fp16.bin"
    )
    parser.add_argument("--vae", metavar="PATH", help="folder or file of another VAE, full or tiny")
    parser.add_argument(
        "--base", metavar="FOLDER", help="for a single file: pipeline folder or hub id with tokenizers and configs"
    )
    parser.add_argument(
        "--variant", help="variant of the folder's weight files, such as fp16 (default: the files without one)"
    )
    parser.add_argument(
        "--share", metavar="BUNDLE", help="bundle of the same model without the LoRA: equal files become hard links"
    )
    parser.add_argument("--sampler", help=f"sampler to store in the bundle: {sampler_names()}")
    parser.add_argument("--steps", type=int, help="steps to store in the bundle")
    parser.add_argument("--guidance", type=float, help="guidance scale to store in the bundle")
    add_sampler_options(parser)
    parser.add_argument(
        "--few-step",
        metavar="NAME",
        help="sample as this kind of few-step model, where its files' names do not say it; none for an ordinary model "
        "(docs/samplers.md lists them)",
    )
    _add_int8(parser)
    parser.add_argument(
        "--engine",
        default="onnx",
        choices=("onnx", "tensorrt"),
        help="onnx: graphs for every engine; tensorrt: engine files for this GPU as well (default: onnx)",
    )
    parser.add_argument(
        "--target",
        default="bundle",
        choices=("bundle", "triton-server"),
        help="triton-server: a model repository for NVIDIA Triton; MODEL may be a bundle then (default: bundle)",
    )
    parser.add_argument("--backend", default="onnxruntime", help="with triton-server: onnxruntime or tensorrt")
    parser.add_argument("--instances", type=int, default=1, help="with triton-server: copies of each model per device")
    parser.add_argument("--kind", default="gpu", help="with triton-server: gpu or cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is already there")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    add_build(parser.add_argument_group("with --engine tensorrt"))


def run(args: argparse.Namespace) -> int:
    if args.target == "triton-server":
        return _triton_server(args)
    return _bundle(args)


def _triton_server(args: argparse.Namespace) -> int:
    """Write a bundle, or a pipeline by way of a temporary bundle, as a model repository."""
    import copy
    import tempfile

    from accel.bundle import Bundle
    from accel.export.int8.settings import refuse_changes
    from accel.export.triton.repository import Serving, write
    from accel.files import refuse_existing

    serving = Serving(backend=args.backend, instances=args.instances, kind=args.kind)
    serving.check()
    refuse_existing(Path(args.out), args.overwrite)
    if is_bundle(args.model):
        given = _given(args, _OF_PIPELINES + _OF_INT8) + ["--precision"] * (args.precision != "fp32")
        refuse_changes(args.model, given, "served")
        command = write(Bundle.open(args.model), args.out, serving, overwrite=args.overwrite)
    else:
        with tempfile.TemporaryDirectory() as folder:
            inner = copy.copy(args)
            inner.out, inner.json, inner.quiet = str(Path(folder) / "bundle"), False, True
            inner.engine = "tensorrt" if args.backend == "tensorrt" else "onnx"
            _bundle(inner)
            command = write(Bundle.open(inner.out), args.out, serving, overwrite=args.overwrite)
    if args.json:
        print(json.dumps({"repository": args.out, "backend": args.backend, "command": command}))
    else:
        print(f"{args.out} is ready: {command}")
    return 0


def _bundle(args: argparse.Namespace) -> int:
    from accel.errors import UserError
    from accel.export.graph import trace
    from accel.export.graph.precision import INT8, check_name
    from accel.export.int8.settings import refuse_changes
    from accel.export.pipeline import COMPONENTS, export_pipeline
    from accel.models.source import open_source

    check_name(args.precision)
    exported = args.precision in INT8 and is_bundle(args.model)
    if exported:
        refuse_changes(args.model, _given(args, _OF_PIPELINES))
    if args.precision not in INT8 and (given := _given(args, _OF_INT8)):
        raise UserError(f"{given[0]} is for int8, but the precision is {args.precision}", "add --precision int8")
    if args.engine == "tensorrt":
        from accel.trt import library
        from accel.trt.cuda import Cuda

        # All of this before the export takes minutes.
        options = build_options(args)
        options.check(library.load().__version__)
        if args.precision in INT8 and args.precision != "auto":
            options.check_int8("the export")
        Cuda(args.gpu)
    source = (
        args.model
        if exported
        else open_source(
            args.model,
            args.lora,
            base=args.base,
            unet=args.unet,
            vae=args.vae,
            variant=args.variant,
            adapter=None if args.adapter is True else args.adapter,
            controlnet=args.controlnet,
            few_step=args.few_step,
        )
    )
    components = tuple(name.strip() for name in args.components.split(",")) if args.components else COMPONENTS
    with progress() as report:
        bundle = export_pipeline(
            source,
            args.out,
            profile=args.profile or "native",
            precision=args.precision,
            opset=trace.DEFAULT_OPSET if args.opset is None else args.opset,
            components=components,
            sampler=_sampler(args, source),
            adapter=args.adapter is True,
            share=args.share,
            overwrite=args.overwrite,
            progress=report,
            int8=_int8(args),
        )
    if args.engine == "tensorrt":
        build_engine_files(bundle, args, (), [])
    if getattr(args, "quiet", False):
        return 0
    if args.json:
        print(json.dumps(bundle.manifest.as_dict(), indent=2))
        return 0
    for component in bundle.manifest.components.values():
        parity = component.parity
        note = f"; kept in float32: {', '.join(component.float32)}" if component.float32 else ""
        note += f" ({parity['precision_reason']})" if component.fp32_output else ""
        if parity.get("precision_reason") and component.dtype == "float32":
            note = f"; kept in float32: {parity['precision_reason']}"
        what = "float32" if component.int8 else "torch"
        print(
            f"{component.name:<15} {component.parameters / 1e6:9.1f} M  {component.precision:<14} "
            f"differs from {what} by {parity['relative_l2']:.1e} (limit {parity['limit']:.1e}){note}"
        )
        for line in summary.lines(component):
            print(f"{'':<15} {line}")
    print(f"{bundle.path} is ready: accel run {bundle.path} --prompt ...")
    return 0


def _given(args: argparse.Namespace, names: list[str]) -> list[str]:
    """The options among `names` that were given, as they are typed."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, [])]


def _add_int8(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("int8")
    group.add_argument("--calibration", type=Path, help="file of prompts to calibrate on (default: built-in ones)")
    group.add_argument("--calibration-images", type=int, help="images to calibrate on (default: 32)")
    group.add_argument("--int8-components", help="components to quantize: unet,text_encoder,vae_decoder (default: all)")
    group.add_argument(
        "--int8-level",
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
    group.add_argument("--int8-observer", help="how calibration chooses ranges: mse (default), percentile or max")
    group.add_argument("--collector", action=_Renamed, dest="int8_observer", help=argparse.SUPPRESS)
    group.add_argument("--smooth", type=float, help="SmoothQuant's alpha for linear layers, 0 to 1 (default: 0, none)")
    group.add_argument(
        "--budget",
        type=float,
        metavar="DB",
        help="least PSNR of images against float32: leave the most sensitive layers in higher precision until it holds",
    )
    group.add_argument(
        "--sensitivity", type=Path, metavar="DIR", help="write a table of what each layer costs (Markdown and JSON)"
    )


class _Renamed(argparse.Action):
    """The old spelling of an option: does what the new one does, and says so."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        warnings.warn(f"{option_string} is now --{self.dest.replace('_', '-')}", Notice, stacklevel=2)
        setattr(namespace, self.dest, values)


def _int8(args: argparse.Namespace) -> Any:
    """The options of the int8 group, as `export_pipeline` takes them."""
    from accel.export.int8.settings import Int8Settings
    from accel.int8.config import Int8Config

    def given(**options: Any) -> dict[str, Any]:
        return {name: value for name, value in options.items() if value is not None}

    config = given(
        level=args.int8_level, keep=tuple(args.int8_keep) or None, observer=args.int8_observer, smooth=args.smooth
    )
    components = args.int8_components
    return Int8Settings(
        **given(
            config=Int8Config(**config) if config else None,
            prompts=args.calibration,
            images=args.calibration_images,
            budget=args.budget,
            sensitivity=args.sensitivity,
            components=None if components is None else tuple(map(str.strip, components.split(","))),
        )
    )


def _sampler(args: argparse.Namespace, source: Any) -> dict[str, Any] | None:
    """The sampling constants to store: those given, and the source's for the rest; None if none is given."""
    options = sampler_options(args)
    if args.sampler is None and args.steps is None and args.guidance is None and not options:
        return None
    from accel.export.constants import chosen_sampling

    return chosen_sampling(source, args.sampler, args.steps, args.guidance, options)
