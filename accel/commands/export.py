"""Export a diffusers pipeline to a bundle."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ..bundle import Bundle, is_bundle
from ..bundle.kinds import usual_components
from ..command_line.options import (
    add_build,
    add_few_step,
    add_gpu,
    add_out,
    add_sampling,
    build_device,
    build_engine_files,
    build_options,
    next_command,
    sampler_options,
)
from ..command_line.parser import WrongUse, renamed, several
from ..command_line.quantized import GIVEN, add_quantized, check_quantized, given, int8_settings
from ..command_line.remembered import remembering
from ..dtypes import PRECISIONS, QUANTIZED
from ..errors import UserError
from ..int8 import summary
from ..int8.formats import FORMATS
from ..progress import progress

EXAMPLE = "accel export digits/4step my-bundle --precision int8 --profile digits"
COMPONENTS = usual_components()
# Options that export a pipeline. Those that are not given are None or empty.
_OF_PIPELINES = "lora embedding unet vae adapter controlnet base variant sampler steps guidance profile opset".split()
_OF_PIPELINES += "components clip_skip few_step sigmas timestep_spacing eta shift".split()
_OF_PIPELINES += "ip_adapter image_encoder safety_checker".split()
_OF_CLASSES = "sampler steps guidance profile opset".split()  # those that an EDM model has as well


def add_arguments(parser: Any) -> None:
    from ..bundle.shape_profiles import PROFILES

    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a diffusers pipeline folder, a hub id, a shipped model, or a single .safetensors checkpoint; for int8 a "
        "bundle too; or the folder of an EDM model, which draws images of classes",
    )
    parser.add_argument("folder", nargs="?", metavar="OUT", help="the bundle to write, the same as --out")
    add_out(parser, "the bundle to write; it appears only when everything has succeeded", metavar="OUT")
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=(*PRECISIONS, *QUANTIZED),
        metavar="PRECISION",
        help=f"{', '.join((*PRECISIONS, *QUANTIZED))}: of weights and products. int8-fp16 and fp8 (compute capability "
        "8.9) are for GPUs; weight-only ones save memory; auto is int8 where it is faster and within the parity budget "
        "(default: fp32)",
    )
    parser.add_argument(
        "--profile",
        metavar="SHAPES",
        help="shapes to accept: native (batch 1-4 at the model's own size), static (batch 1), "
        f"{', '.join(PROFILES)}; or spelled out: batch=1-4,height=256-768,width=512 (default: native)",
    )
    parser.add_argument(
        "--components",
        type=several("component", COMPONENTS),
        metavar="NAMES",
        help=f"with commas between them: {','.join(COMPONENTS)} (default: all that the model has)",
    )
    parser.add_argument(
        "--safety-checker",
        action="store_true",
        default=None,  # not given
        help="export the model's safety checker too: images that it rejects become black (default: left out)",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX opset, 18 to 24 (default: 20)")
    text = "threads of torch while it traces and compares (default: one for each core)"
    parser.add_argument("--threads", type=int, metavar="N", help=text)
    group = parser.add_argument_group("sampler to store in the bundle")
    add_sampling(group)
    add_few_step(group)
    _add_parts(parser.add_argument_group("parts from elsewhere"))
    add_quantized(parser.add_argument_group("int8"))
    parser.add_argument(
        "--engine",
        default="onnx",
        choices=("onnx", "tensorrt", "tensorrt-rtx"),
        help="onnx: graphs for every engine; tensorrt: engine files for this GPU as well; tensorrt-rtx: engine files "
        "for RTX cards as well, made without one (default: onnx)",
    )
    add_gpu(parser, "with TensorRT or a Triton server: where it runs", cpu=True)
    parser.add_argument(
        "--target",
        default="bundle",
        choices=("bundle", *_TARGETS),
        help="single-graph: one ONNX file from prompt to pixels; openvino-genai: a folder for OpenVINO GenAI and "
        "optimum-intel; triton-server: a model repository; MODEL may be a bundle then (default: bundle)",
    )
    text = "with single-graph: prompts as text are the input, by ONNX Runtime Extensions' tokenizer"
    parser.add_argument("--text-input", action="store_true", help=text)
    text = "with single-graph: height and width are inputs too, within the profile; without it the size is constant"
    parser.add_argument("--size-input", action="store_true", help=text)
    group = parser.add_argument_group("NVIDIA Triton Inference Server")
    group.add_argument(
        "--backend", default="onnxruntime", choices=("onnxruntime", "tensorrt"), help="backend of the repository"
    )
    group.add_argument("--instances", type=int, default=1, metavar="N", help="copies of each model on the device")
    renamed(group, "--kind", "--device", given={"gpu": "cuda", "cpu": "cpu"}.get)
    add_build(parser.add_argument_group("with --engine tensorrt or tensorrt-rtx"))


def _add_parts(group: Any) -> None:
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[=SCALE]",
        help="LoRA to fuse into the weights, diffusers' or kohya's (repeatable; default scale: 1)",
    )
    group.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[=TOKEN]",
        help="textual inversion whose token prompts may use: diffusers', A1111's or SDXL's (repeatable; default token: "
        "the file's own)",
    )
    group.add_argument(
        "--unet", metavar="FILE", help="UNet weights instead of the model's own, such as dmd2_sdxl_4step_unet_fp16.bin"
    )
    text = "do without the text encoder's last N layers for prompts, as diffusers' clip_skip (A1111's number less 1)"
    group.add_argument("--clip-skip", type=int, metavar="N", help=text)
    group.add_argument("--vae", metavar="PATH", help="folder or file of another VAE, full or tiny")
    group.add_argument(
        "--adapter",
        nargs="?",
        const=True,
        metavar="FOLDER",
        help="T2I-Adapter to export with it; without a folder, the UNet gets its inputs alone",
    )
    text = "ControlNet to export with it (repeatable: up to three, whose residuals are added)"
    group.add_argument("--controlnet", action="append", default=[], metavar="FOLDER", help=text)
    group.add_argument(
        "--ip-adapter", metavar="FILE", help="IP-Adapter to put into the UNet, such as ip-adapter_sd15.safetensors"
    )
    group.add_argument(
        "--image-encoder", metavar="FOLDER", help="the IP-Adapter's image encoder (default: the pipeline's own)"
    )
    group.add_argument(
        "--base", metavar="FOLDER", help="for a single file: pipeline folder or hub id with tokenizers and configs"
    )
    text = "variant of the folder's weight files, such as fp16 (default: the files without one)"
    group.add_argument("--variant", metavar="NAME", help=text)
    group.add_argument(
        "--share", metavar="BUNDLE", help="bundle of the same model without the LoRA: equal files become hard links"
    )


def run(args: argparse.Namespace) -> int:
    if (args.folder is None) == (args.out is None):
        raise WrongUse("accel export: give the folder to write, once", f"for example {EXAMPLE}")
    args.out = args.out or args.folder
    # Tensors of an export are large and short-lived: huge pages spare torch a fifth of its time. Read at torch's start.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    for name in ("text", "size"):
        if getattr(args, f"{name}_input") and args.target != "single-graph":
            raise UserError(f"--{name}-input is for one graph", "add --target single-graph")
    if args.engine != "onnx" and args.target in ("single-graph", "openvino-genai"):
        raise UserError(f"--target {args.target} has no engine files (--engine {args.engine})", "leave --engine out")
    return _TARGETS[args.target](args) if args.target in _TARGETS else _bundle(args)


@contextmanager
def _bundle_of(args: argparse.Namespace, used: str, engine: str = "onnx") -> Iterator[Bundle]:
    """MODEL as a bundle: itself, or a temporary one of a pipeline.

    Args:
        used: what is done with it, for the error about options that a bundle no longer takes.
    """
    import copy
    import tempfile

    from accel.export.int8.settings import refuse_changes
    from accel.files import refuse_existing

    refuse_existing(Path(args.out), args.overwrite)
    _of_classes(args)
    if is_bundle(args.model):
        changed = given(args, _OF_PIPELINES + GIVEN) + ["--precision"] * (args.precision != "fp32")
        refuse_changes(args.model, changed, used)
        yield Bundle.open(args.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        inner = copy.copy(args)
        inner.out, inner.json, inner.silent, inner.engine = str(Path(folder) / "bundle"), False, True, engine
        _bundle(inner)
        yield Bundle.open(inner.out)


def _triton_server(args: argparse.Namespace) -> int:
    """Write a bundle, or a pipeline by way of a temporary bundle, as a model repository."""
    from accel.export.triton.repository import Serving, write

    serving = Serving(backend=args.backend, instances=args.instances, kind="cpu" if args.device == "cpu" else "gpu")
    serving.check()
    with _bundle_of(args, "served", "tensorrt" if args.backend == "tensorrt" else "onnx") as bundle:
        command = write(bundle, args.out, serving, overwrite=args.overwrite)
    if args.json:
        print(json.dumps({"repository": args.out, "backend": args.backend, "command": command}))
    else:
        print(f"{args.out} is ready: {command}")
    return 0


def _written(args: argparse.Namespace) -> int:
    """Write a bundle, or a pipeline by way of a temporary bundle, as one graph or as a folder for OpenVINO GenAI."""
    graph = args.target == "single-graph"
    target = import_module(f"accel.export.{'single_graph.export' if graph else 'openvino_genai'}")
    how = {"text": args.text_input, "size": args.size_input} if graph else {}
    used = "written as one graph" if graph else "written for OpenVINO GenAI"
    with _bundle_of(args, used) as bundle, progress(args.target) as report:
        record = target.write(bundle, args.out, overwrite=args.overwrite, progress=report, **how)
    print(json.dumps(record, indent=2) if args.json else target.describe(Path(args.out), record))
    return 0


_TARGETS = {"single-graph": _written, "openvino-genai": _written, "triton-server": _triton_server}


def _bundle(args: argparse.Namespace) -> int:
    from accel.export.graph import trace
    from accel.export.int8.settings import refuse_changes
    from accel.export.pipeline import export_pipeline
    from accel.models.source import open_source

    of_classes = _of_classes(args)
    exported = args.precision in QUANTIZED and is_bundle(args.model)
    if exported:
        refuse_changes(args.model, given(args, _OF_PIPELINES))
    if args.precision not in QUANTIZED and (names := given(args, GIVEN)):
        raise UserError(f"{names[0]} is for int8, but the precision is {args.precision}", "add --precision int8")
    if args.precision in QUANTIZED:
        check_quantized(args)
    if args.engine != "onnx":
        from accel.export.tensorrt import build
        from accel.trt import library

        # All of this before the export takes minutes.
        options, device = build_options(args), build_device(args)
        options.check(library.load(args.engine), args.targets, device)
        if args.precision in QUANTIZED and args.precision != "auto":
            options.check_format(FORMATS[QUANTIZED[args.precision][0]], "the export", args.targets or ())
        build.place(args.engine, device=device, targets=args.targets)
    elif args.targets:
        raise UserError("--targets is for engine files, and none are made", "add --engine tensorrt-rtx")
    source = (
        args.model
        if exported or of_classes
        else open_source(
            args.model,
            args.lora,
            base=args.base,
            unet=args.unet,
            vae=args.vae,
            variant=args.variant,
            adapter=None if args.adapter is True else args.adapter,
            controlnet=args.controlnet,
            ip_adapter=args.ip_adapter,
            image_encoder=args.image_encoder,
            few_step=args.few_step,
            safety_checker=bool(args.safety_checker),
            embeddings=args.embedding,
        )
    )
    with progress() as report:
        bundle = export_pipeline(
            source,
            args.out,
            profile=args.profile or "native",
            precision=args.precision,
            opset=trace.DEFAULT_OPSET if args.opset is None else args.opset,
            components=args.components or COMPONENTS,
            sampler=_sampler_of_classes(args) if of_classes else _sampler(args, source),
            adapter=args.adapter is True,
            share=args.share,
            safety_checker=bool(args.safety_checker),
            clip_skip=args.clip_skip or 0,
            overwrite=args.overwrite,
            progress=report,
            int8=int8_settings(args),
        )
    bundle = remembering(bundle, args)
    if args.engine != "onnx":
        build_engine_files(bundle, args, (), [], args.engine)
    if getattr(args, "silent", False):
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
    unet = bundle.manifest.components.get("unet")
    if args.precision == "fp32" and unet and (line := summary.prospect(unet)):
        print(line)
    print(f"{bundle.path} is ready{next_command(bundle)}")
    return 0


def _of_classes(args: argparse.Namespace) -> bool:
    """Whether MODEL draws images of classes.

    Raises:
        UserError: for options that such a model has no use for.
    """
    from accel.export.class_to_image import takes

    if not takes(args.model):
        return False
    of_texts = given(args, [name for name in _OF_PIPELINES if name not in _OF_CLASSES] + ["share"] + GIVEN)
    if args.target != "bundle":
        of_texts.append("--target")
    if of_texts:
        name = of_texts[0]
        raise UserError(f"{name} is for models of texts, and {args.model} draws images of classes", f"leave {name} out")
    return True


def _sampler_of_classes(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of an EDM model's sampler; the export completes it."""
    chosen = {"name": args.sampler, "steps": args.steps, "guidance": args.guidance}
    return {name: value for name, value in chosen.items() if value is not None}


def _sampler(args: argparse.Namespace, source: Any) -> dict[str, Any] | None:
    """The sampling constants to store: those given, and the source's for the rest; None if none is given."""
    options = sampler_options(args)
    if args.sampler is None and args.steps is None and args.guidance is None and not options:
        return None
    from accel.models.constants import chosen_sampling

    return chosen_sampling(source, args.sampler, args.steps, args.guidance, options)
