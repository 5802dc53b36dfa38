"""`accel run`: make images from prompts, on any engine."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from ..errors import UserError
from .options import add_engine, add_json, add_sampling, engine_options, sampler_options

EXAMPLE = 'accel run my-bundle --prompt "a fox in the snow" --seed 7 --out fox.png'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a bundle folder")
    parser.add_argument("--prompt", action="append", required=True, help="text of the image; repeatable")
    parser.add_argument("--negative", help="negative prompt: text to steer away from (needs guidance above 1)")
    parser.add_argument("--out", default="out.png", help="image to write; several are numbered (default: out.png)")
    parser.add_argument("--images", type=int, default=1, help="images per prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; the others count on (default: 0)")
    parser.add_argument("--image", metavar="FILE", help="start from this image (image-to-image)")
    parser.add_argument("--mask", metavar="FILE", help="with --image: repaint only where this is white")
    parser.add_argument(
        "--strength", type=float, help="how much of --image is changed, 0 to 1 (default: 0.8; with --mask 1)"
    )
    parser.add_argument("--control", metavar="FILE", help="image that guides the bundle's T2I-Adapter or ControlNet")
    parser.add_argument("--canny", action="store_true", help="guide by the edges of --control (Canny)")
    parser.add_argument("--control-scale", type=float, default=1.0, help="strength of --control (default: 1)")
    parser.add_argument(
        "--control-end", type=float, default=1.0, help="share of the steps, from the first, that it guides"
    )
    parser.add_argument("--height", type=int, help="pixels (default: the model's own size)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's own size)")
    parser.add_argument("--original-size", type=_pair, metavar="HxW", help="SDXL: original size (default: the image's)")
    parser.add_argument("--crop", type=_pair, metavar="TOPxLEFT", default=(0, 0), help="SDXL: corner of the crop")
    parser.add_argument("--target-size", type=_pair, metavar="HxW", help="SDXL: target size (default: the image's)")
    parser.add_argument("--prompt-weights", action="store_true", help="weight words in prompts, as in (words:1.3)")
    parser.add_argument("--low-memory", action="store_true", help="load each network on first use, drop it afterwards")
    add_sampling(parser)
    add_engine(parser)
    add_json(parser)


def _pair(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not two whole numbers such as 512x768")
    first, second = text.split("x")
    return int(first), int(second)


def run(args: argparse.Namespace) -> int:
    from ..images import canny
    from ..pipeline import load

    if not all(prompt.strip() for prompt in args.prompt):
        raise UserError("the prompt is empty", 'describe the image: --prompt "a fox in the snow"')
    out = Path(args.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"{out} is not an image file name", "use .png, .jpg or .webp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(f"cannot write in {out.parent}: {error.strerror}", "choose another --out") from None
    if out.is_dir():
        raise UserError(f"{out} is a folder", "choose another --out")
    if args.canny and args.control is None:
        raise UserError("--canny needs an image", "add --control FILE")
    control = canny(args.control) if args.canny else args.control
    pipeline = load(args.bundle, engine=args.engine, low_memory=args.low_memory, **engine_options(args))
    if args.engine == "auto" and not args.json and not args.low_memory:
        unet = pipeline.engines["unet"]
        print(f"engine: {unet.name} ({unet.description})", file=sys.stderr)
    result = pipeline(
        args.prompt,
        args.negative,
        height=args.height,
        width=args.width,
        sampler=args.sampler,
        steps=args.steps,
        guidance_scale=args.guidance,
        **sampler_options(args),
        num_images_per_prompt=args.images,
        seed=args.seed,
        image=args.image,
        mask_image=args.mask,
        strength=args.strength,
        control_image=control,
        control_scale=args.control_scale,
        control_end=args.control_end,
        original_size=args.original_size,
        crop=args.crop,
        target_size=args.target_size,
        prompt_weights=args.prompt_weights,
        progress=sys.stderr.isatty(),
    )
    names = (
        [out] if len(result.images) == 1 else [out.with_stem(f"{out.stem}-{i:03d}") for i in range(len(result.images))]
    )
    for name, image in zip(names, result.images, strict=True):
        _save(image, name)
    seconds = {key: round(value, 4) for key, value in result.seconds.items()}
    if args.json:
        record = {"images": [str(name) for name in names], "seeds": result.seeds, "seconds": seconds}
        print(json.dumps(record | {"engines": pipeline.engines.descriptions}))
    else:
        parts = ", ".join(f"{key.replace('_', ' ')} {value:.3f} s" for key, value in seconds.items())
        print(f"{', '.join(map(str, names))} ({parts})")
    return 0


def _save(image, path: Path) -> None:
    try:
        image.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}", "choose another --out") from None
