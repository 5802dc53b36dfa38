"""`accel serve`: an images server, with OpenAI's and A1111's API."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import Any

from ..command_line.options import add_engine, engine_of, size
from ..errors import MissingPackage, Notice, UserError

EXAMPLE = "accel serve digits/4step-int8 --port 8000"
KEY = "ACCEL_API_KEY"
_PACKAGES = ("fastapi", "uvicorn", "multipart", "prometheus_client")
_POLICIES = ("fifo", "shortest")


def add_arguments(parser: Any) -> None:
    parser.add_argument("bundle", nargs="+", metavar="MODEL", help="bundles or pipelines; the first is the default")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 for any free one (default: 8000)")
    text = f"key that clients must send; better given as {KEY} in the environment"
    parser.add_argument("--api-key", metavar="KEY", help=text)
    group = parser.add_argument_group("batches")
    text = "rows of the largest UNet call, where an image with guidance takes two (default: 8, or the model's own most)"
    group.add_argument("--batch", type=int, metavar="ROWS", help=text)
    text = "fill every UNet call up to --batch rows: an image has the same bits whatever else is being made"
    group.add_argument("--fixed-batch", action="store_true", help=text)
    text = "which images go first: in order of arrival, or those with the fewest steps left (default: fifo)"
    group.add_argument("--policy", choices=_POLICIES, default="fifo", help=text)
    text = "make each image by itself, from its first step to its last"
    group.add_argument("--no-step-batching", action="store_true", help=text)
    text = "LoRA file that requests may name; repeat for several"
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=FILE", help=text)
    group = parser.add_argument_group("limits")
    for flag, value, text in (
        ("--max-images", 10, "images of one request"),
        ("--max-steps", 150, "steps of one image"),
        ("--max-side", 2048, "pixels of a side"),
        ("--max-queue", 64, "images that wait or are in the making"),
    ):
        group.add_argument(flag, type=int, default=value, metavar="N", help=f"{text} (default: {value})")
    text = "bytes of one request (default: 20M)"
    group.add_argument("--max-body", type=size, default=20 << 20, metavar="SIZE", help=text)
    text = "seconds that a request may take (default: 600)"
    group.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help=text)
    text = "leave out the models' safety checkers"
    parser.add_argument("--no-safety-checker", action="store_true", help=text)
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    from importlib.util import find_spec

    for name in _PACKAGES:
        if find_spec(name) is None:
            raise MissingPackage(name, "accel serve", "serve")
    import uvicorn

    from ..serving.app import LOCAL, create
    from ..serving.metrics import Metrics

    if not 0 <= args.port < 65536:
        raise UserError(f"invalid port: {args.port} (expected 0 to 65535)", "--port 8000")
    if len(set(args.bundle)) < len(args.bundle):
        raise UserError("a model is named twice", "name each model once")
    key, local = args.api_key or os.environ.get(KEY), args.host in LOCAL
    if not local and not key:
        text = f"everybody who reaches {args.host} can use this server: give it a key, {KEY}=... or --api-key"
        warnings.warn(text, Notice, stacklevel=2)
    limits, metrics = _limits(args), Metrics()
    workers = []
    try:
        for model in args.bundle:
            workers.append(_worker(model, args, limits, metrics))
        hosts = ("127.0.0.1", "localhost", "[::1]") if local and not key else ()
        app = create(workers, metrics, limits=limits, key=key, hosts=hosts)
        level = "info" if args.verbose else "warning"
        config = uvicorn.Config(app, args.host, args.port, log_level=level, timeout_graceful_shutdown=30)
        _serve(uvicorn.Server(config), args)
    finally:
        for worker in workers:
            worker.close(0)
    return 0


def _limits(args: argparse.Namespace) -> Any:
    from ..serving.limits import Limits

    limits = Limits(args.max_images, args.max_steps, args.max_side, args.max_queue, args.max_body, args.timeout)
    for name, value in vars(limits).items():
        if not value > 0:
            raise UserError(f"invalid limit: {name} = {value} (expected above 0)", "leave it out for the default")
    return limits


def _worker(model: str, args: argparse.Namespace, limits: Any, metrics: Any) -> Any:
    """A model, loaded, and the thread that makes its images."""
    from ..bundle import Bundle
    from ..loading.loader import load, runnable
    from ..serving.batch import Shapes
    from ..serving.row_unet import with_row_timesteps
    from ..serving.worker import Worker

    engine, options = engine_of(args)
    options["safety_checker"] = not args.no_safety_checker
    ready = runnable(model, engine, safety_checker=options["safety_checker"])
    bundle = ready if isinstance(ready, Bundle) else Bundle.open(ready)
    bundle = with_row_timesteps(bundle, engine, options.get("device", "auto"))
    pipeline = load(bundle, engine, **options)
    try:
        unet = pipeline.engines["unet"].component
        batch = unet.dims[unet.inputs[0].shape[0]]
        shapes = Shapes.of(batch, args.batch, args.fixed_batch, int8=bool(unet.int8))
        worker = Worker(
            model,
            pipeline,
            shapes=shapes,
            policy=args.policy,
            limits=limits,
            loras=dict(map(_lora, args.lora)),
            observer=metrics,
            share=not args.no_step_batching,
        )
    except BaseException:
        pipeline.close()
        raise
    if not args.quiet:
        steps = "each at its own step" if worker.row_timesteps else "at the same step"
        what = f"up to {shapes.most} rows in a UNet call, {steps}" if worker.share else "one image at a time"
        print(f"{model}: {pipeline.engines['unet'].description}; {what}", file=sys.stderr)
    return worker


def _lora(text: str) -> tuple[str, str]:
    name, _, file = text.partition("=")
    if not name or not os.path.exists(file):
        raise UserError(f"--lora {text}: there is no such file", "--lora NAME=FILE")
    return name, file


def _serve(server: Any, args: argparse.Namespace) -> None:
    """Listen until a signal comes; then finish what was begun."""
    import json
    import socket

    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((args.host, args.port))
        except OSError as error:
            fix = "--port 0 takes any that is free"
            raise UserError(f"cannot listen at {args.host} port {args.port}: {error.strerror}", fix) from None
        port = listening.getsockname()[1]
        host = f"[{args.host}]" if ":" in args.host else args.host
        if args.json:
            print(json.dumps({"url": f"http://{host}:{port}", "models": args.bundle}), flush=True)
        elif not args.quiet:
            print(f"http://{host}:{port}/v1 (OpenAI), http://{host}:{port} (A1111); Ctrl-C ends it", file=sys.stderr)
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn has shut down in order, and raises the signal again
            pass
