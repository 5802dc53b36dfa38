"""`accel run`: make images from prompts or of classes, on any engine."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from ..assets import DIGITS_PROMPTS, knows_only_digits, names_a_digit
from ..command_line.options import (
    add_engine,
    add_few_step,
    add_out,
    add_prompts,
    add_sampling,
    add_seed,
    add_size,
    engine_of,
    prompts_of,
    sampler_options,
)
from ..command_line.parser import WrongUse, renamed
from ..dtypes import SHORT
from ..engines.offloading import MODES
from ..errors import Notice, UserError

EXAMPLE = 'accel run digits/4step --prompt "a handwritten seven" --seed 7 --out seven.png'
# What a model of classes takes; every other option is for one of texts.
_FOR_CLASSES = "--class -o --out --overwrite --images --seed --sampler --steps --churn --low-memory --offload --engine"
_FOR_CLASSES += " --device --precision --dtype --attention --tf32 --layout --provider --cuda-graph --engine-file --plan"
_FOR_CLASSES += " --allow-host-code --specialization --threads --json -q --quiet -v --verbose --num-images"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def add_arguments(parser: Any) -> None:
    parser.add_argument("bundle", metavar="MODEL", help="a bundle; or a pipeline folder, hub id or shipped model")
    add_prompts(parser)
    text = "of a model that draws images of classes (EDM): which one; repeatable"
    parser.add_argument("--class", dest="classes", action="append", type=int, metavar="N", help=text)
    parser.add_argument("--negative", metavar="TEXT", help="negative prompt: what to steer away from (with guidance)")
    add_out(parser, "image to write; several are numbered (default: out.png, or out-1.png, ... if that exists)")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images per prompt or class (default: 1)")
    add_seed(parser)
    add_size(parser)
    add_sampling(parser, whose="the bundle's own")
    add_few_step(parser)
    text = (
        "fresh noise before each of heun's steps, of a model of classes (S_churn; 40 with 256 steps is EDM's ImageNet)"
    )
    parser.add_argument("--churn", type=float, metavar="AMOUNT", help=text)
    parser.add_argument("--prompt-weights", action="store_true", help="weight words in prompts, as in (words:1.3)")
    text = "do without the text encoder's last N layers for prompts (default: as it was exported)"
    parser.add_argument("--clip-skip", type=int, metavar="N", help=text)
    text = "LoRA file to run with, fused into the weights in memory; repeat for several"
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[=SCALE]", help=text)
    text = "leave out the model's safety checker: no image becomes black"
    parser.add_argument("--no-safety-checker", action="store_true", help=text)
    text = "file of textual inversion, whose token the prompt may use (default: the file's own token); repeatable"
    parser.add_argument("--embedding", action="append", default=[], metavar="FILE[=TOKEN]", help=text)
    parser.add_argument("--low-memory", action="store_true", help="load each network on first use, drop it afterwards")
    text = (
        "keep on the GPU one network at a time (model) or, on eager, one layer (sequential); the rest waits on the host"
    )
    parser.add_argument("--offload", choices=MODES, help=text)
    text = "what the text encoders compute in, on eager, compile and openvino (default: as the others)"
    parser.add_argument("--text-encoder-precision", choices=tuple(SHORT), help=text)
    text = "decode and encode in overlapping tiles: large images in the memory of a tile"
    parser.add_argument("--vae-tiling", action="store_true", default=None, help=text)
    text = "side of a tile, which enables tiling too (default: the VAE's own size)"
    parser.add_argument("--vae-tile", type=int, metavar="PX", help=text)
    group = parser.add_argument_group("images to start from and to be guided by")
    group.add_argument("--image", metavar="FILE", help="start from this image (image-to-image)")
    group.add_argument("--mask", metavar="FILE", help="with --image: repaint only where this is white")
    text = "how much of --image is changed, 0 to 1 (default: 0.8; with --mask 1)"
    group.add_argument("--strength", type=float, metavar="SHARE", help=text)
    text = "how closely a model that edits images (InstructPix2Pix) keeps to --image (default: 1.5)"
    group.add_argument("--image-guidance", type=float, metavar="SCALE", help=text)
    text = "image that guides the bundle's T2I-Adapter or ControlNet; repeat, in order, for several ControlNets"
    group.add_argument("--control", action="append", metavar="FILE", help=text)
    group.add_argument("--canny", action="store_true", help="guide by the edges of --control (Canny)")
    text = "strength of --control (default: 1); repeat for several"
    group.add_argument("--control-scale", action="append", type=float, metavar="SCALE", help=text)
    text = "share of the steps, from the first, that --control guides (default: 1); repeat for several"
    group.add_argument("--control-end", action="append", type=float, metavar="SHARE", help=text)
    text = "picture that the bundle's IP-Adapter is shown as a prompt; repeat to show several together"
    group.add_argument("--image-prompt", action="append", default=[], metavar="FILE", help=text)
    text = "strength of --image-prompt (default: 1)"
    group.add_argument("--image-prompt-scale", type=float, default=1.0, metavar="SCALE", help=text)
    group = parser.add_argument_group("SDXL's size conditioning")
    text = "original size (default: the image's)"
    group.add_argument("--original-size", type=_pair, metavar="HxW", help=text)
    group.add_argument("--crop", type=_pair, metavar="TOPxLEFT", default=(0, 0), help="corner of the crop")
    group.add_argument("--target-size", type=_pair, metavar="HxW", help="target size (default: the image's)")
    text = "aesthetic score that an SDXL refiner is told, 1 to 10 (default: 6)"
    group.add_argument("--aesthetic-score", type=float, default=6.0, metavar="SCORE", help=text)
    add_engine(parser)
    for old, new in {"--negative-prompt": "--negative", "--num-images": "--images"}.items():
        renamed(parser, old, new)


def _pair(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not two whole numbers such as 512x768")
    first, second = text.split("x")
    return int(first), int(second)


def run(args: argparse.Namespace) -> int:
    if args.images < 1:
        raise UserError(f"invalid images: {args.images} (expected an integer >= 1)", "--images 1, or more")
    from ..class_to_image import opened as opened_by_class

    bundle = opened_by_class(args.bundle)
    return _of_texts(args) if bundle is None else _of_classes(args, bundle)


def _of_classes(args: argparse.Namespace, bundle: Any) -> int:
    """Images of classes."""
    from ..class_to_image import complete
    from ..loading import load

    typed = [word.partition("=")[0] for word in args.typed if re.match(r"--?[a-z]", word)]
    known = _FOR_CLASSES.split()
    if strange := [flag for flag in typed if flag not in known and flag[:2] not in ("-o", "-q", "-v")]:
        fix = f"leave {strange[0]} out; accel run {args.bundle} --class 0 draws with it"
        raise UserError(f"{strange[0]} is for models of texts, and {args.bundle} draws images of classes", fix)
    how = dict(sampler=args.sampler, steps=args.steps, churn=args.churn, images_per_class=args.images, seed=args.seed)
    request = complete(bundle.manifest, args.classes, **how)
    names = _names(args.out, len(request.seeds), args.overwrite)
    engine, options = engine_of(args)
    pipeline = load(bundle, engine=engine, low_memory=args.low_memory, offload=args.offload, **options)
    if engine == "auto" and not (args.json or args.quiet or args.low_memory or args.offload):
        loaded = pipeline.engines["denoiser"]
        print(f"engine: {loaded.name} ({loaded.description})", file=sys.stderr)
    result = pipeline(args.classes, progress=True, **how)
    for name, image in zip(names, result.images, strict=True):
        _save(image, name)
    seconds = {key: round(value, 4) for key, value in result.seconds.items()}
    if args.json:
        record = {"images": [str(name) for name in names], "classes": request.labels, "seeds": result.seeds}
        print(json.dumps(record | {"seconds": seconds, "engines": pipeline.engines.descriptions}))
    else:
        _say(names, result.seeds, seconds)
    return 0


def _of_texts(args: argparse.Namespace) -> int:
    """Images of prompts."""
    from ..images import canny
    from ..loading import load, opened
    from ..pipeline import check_call

    if (flag := "--class" if args.classes else "--churn" if args.churn is not None else None) is not None:
        what = f"{flag} is for models that draw images of classes, and {args.bundle} draws what a text says"
        raise UserError(what, f'accel run {args.bundle} --prompt "..."')
    prompts = prompts_of(args)
    if not prompts:
        raise WrongUse("accel run: no prompt is given", f"for example {EXAMPLE}")
    names = _names(args.out, len(prompts) * args.images, args.overwrite)
    for option in ("image", "mask", "control", "image_prompt"):
        given = getattr(args, option) or []
        for file in [given] if isinstance(given, str) else given:
            if not Path(file).is_file():
                text = f"--{option.replace('_', '-')} {file}: there is no such file"
                raise UserError(text, "name an image file")
    if args.canny and args.control is None:
        raise UserError("--canny needs an image", "add --control FILE")
    call = dict(
        prompt=prompts,
        negative_prompt=args.negative,
        height=args.height,
        width=args.width,
        sampler=args.sampler,
        steps=args.steps,
        guidance_scale=args.guidance,
        num_images_per_prompt=args.images,
        seed=args.seed,
        image=args.image,
        mask_image=args.mask,
        strength=args.strength,
        image_guidance_scale=args.image_guidance,
        control_image=_one_or_all(args.control),
        control_scale=_one_or_all(args.control_scale or [1.0]),
        control_end=_one_or_all(args.control_end or [1.0]),
        ip_adapter_image=[args.image_prompt] if args.image_prompt else None,
        ip_adapter_scale=args.image_prompt_scale,
        original_size=args.original_size,
        crop=args.crop,
        target_size=args.target_size,
        aesthetic_score=args.aesthetic_score,
        prompt_weights=args.prompt_weights,
        clip_skip=args.clip_skip,
        progress=True,
        **sampler_options(args),
    )
    engine, options = engine_of(args)
    options["safety_checker"] = not args.no_safety_checker
    bundle = opened(args.bundle, engine, few_step=args.few_step, safety_checker=options["safety_checker"])
    tiling = dict(vae_tiling=args.vae_tiling, vae_tile=args.vae_tile)
    check_call(bundle, **tiling, **call)
    if knows_only_digits(str(bundle.manifest.source["name"])) and not all(map(names_a_digit, prompts)):
        warnings.warn(
            f"this model draws handwritten digits alone: --prompt {DIGITS_PROMPTS[0]!r}", Notice, stacklevel=1
        )
    if args.canny:
        call["control_image"] = _one_or_all([canny(file) for file in args.control])
    changed = dict(loras=args.lora, embeddings=args.embedding)
    memory = dict(low_memory=args.low_memory, offload=args.offload, text_encoder_dtype=args.text_encoder_precision)
    pipeline = load(bundle, engine=engine, **memory, **changed, **tiling, **options)
    spared = args.low_memory or args.offload
    if engine == "auto" and not args.json and not spared and not args.quiet:
        unet = pipeline.engines["unet"]
        print(f"engine: {unet.name} ({unet.description})", file=sys.stderr)
    result = pipeline(**call)
    for name, image in zip(names, result.images, strict=True):
        _save(image, name)
    seconds = {key: round(value, 4) for key, value in result.seconds.items()}
    if args.json:
        record = {"images": [str(name) for name in names], "seeds": result.seeds, "seconds": seconds}
        record |= {"nsfw_content_detected": result.nsfw_content_detected}
        record |= {"loras": [str(file) for file in pipeline.loras]} if pipeline.loras else {}
        learned = [embedding.token for embedding in pipeline.embeddings]
        record |= {"embeddings": learned} if learned else {}
        print(json.dumps(record | {"engines": pipeline.engines.descriptions}))
    else:
        _say(names, result.seeds, seconds)
    return 0


def _say(names: list[Path], seeds: list[int], seconds: dict[str, float]) -> None:
    written = str(names[0]) if len(names) == 1 else f"{names[0]} to {names[-1].name}: {len(names)} images"
    parts = ", ".join(f"{key.replace('_', ' ')} {value:.3f} s" for key, value in seconds.items())
    print(f"{written} (seed {seeds[0]}; {parts})")


def _one_or_all(values: list[Any] | None) -> Any:
    """What was given once as itself, what was given several times as a list."""
    return values[0] if values and len(values) == 1 else values


def _names(out: str | None, images: int, overwrite: bool) -> list[Path]:
    """The files to write, in a folder that can be written; without `--out` the first ones that are free.

    Raises:
        UserError: for a name that is no image's, a file that is there, or a folder that cannot be written.
    """
    path = Path(out or "out.png")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is not an image file name", "use .png, .jpg or .webp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"cannot write in {path.parent}: {error.strerror}", "choose another --out") from None
    if path.is_dir():
        raise UserError(f"{path} is a folder", "choose another --out")
    for candidate in _candidates(path, free=out is None):
        names = [candidate]
        if images > 1:
            names = [candidate.with_stem(f"{candidate.stem}-{i:03d}") for i in range(images)]
        taken = next((name for name in names if name.exists()), None)
        if taken is None or overwrite:
            return names
        if out is not None:
            raise UserError(f"{taken} exists already", "add --overwrite, or choose another --out")
    raise AssertionError("there is always a free name")


def _candidates(path: Path, free: bool) -> Iterator[Path]:
    yield path
    if free:
        yield from (path.with_stem(f"{path.stem}-{i}") for i in count(1))


def _save(image: Any, path: Path) -> None:
    try:
        image.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}", "choose another --out") from None
