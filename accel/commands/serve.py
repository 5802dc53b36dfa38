"""`accel serve`: an images server, with OpenAI's and A1111's API."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from ..command_line.options import add_engine, engine_of, size
from ..errors import MissingPackage, Notice, UserError

EXAMPLE = "accel serve digits/4step-int8 --port 8000"
KEY = "ACCEL_API_KEY"
_PACKAGES = ("fastapi", "uvicorn", "multipart", "prometheus_client")
_POLICIES = ("fifo", "shortest")
_MODELS = "bundles or pipelines, each also as NAME=MODEL with the name that clients use; the first is the default"
_LOCAL = ("127.0.0.1", "localhost", "::1")
_RAY = {
    "--ray-address": "ray_address",
    "--replicas": "replicas",
    "--gpus-per-replica": "gpus_per_replica",
    "--cpus-per-replica": "cpus_per_replica",
}


def add_arguments(parser: Any) -> None:
    parser.add_argument("bundle", nargs="+", metavar="MODEL", help=_MODELS)
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
    group = parser.add_argument_group("replicas in a Ray cluster")
    text = "serve from a Ray cluster; where accel is served there already, replace that replica by replica"
    group.add_argument("--ray", action="store_true", help=text)
    text = "of the cluster, or local for a new one (default: RAY_ADDRESS, or that of this machine, or a new one)"
    group.add_argument("--ray-address", metavar="ADDRESS", help=text)
    text = "replicas of each model, such as 2; or 1-4 for as many as the load asks (default: 1)"
    group.add_argument("--replicas", metavar="N[-M]", help=text)
    text = "GPUs of a replica; 0.5 puts two on one (default: 1 where the cluster has GPUs)"
    group.add_argument("--gpus-per-replica", type=float, metavar="N", help=text)
    text = "cores and threads of a replica (default: the cores there are, shared out)"
    group.add_argument("--cpus-per-replica", type=float, metavar="N", help=text)
    text = "leave out the models' safety checkers"
    parser.add_argument("--no-safety-checker", action="store_true", help=text)
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    for name in _PACKAGES:
        if find_spec(name) is None:
            raise MissingPackage(name, "accel serve", "serve")
    if not 0 <= args.port < 65536:
        raise UserError(f"invalid port: {args.port} (expected 0 to 65535)", "--port 8000")
    key, local = args.api_key or os.environ.get(KEY), args.host in _LOCAL
    if not local and not key:
        text = f"everybody who reaches {args.host} can use this server: give it a key, {KEY}=... or --api-key"
        warnings.warn(text, Notice, stacklevel=2)
    limits = _limits(args)
    models = _models(args, limits)
    hosts = ("127.0.0.1", "localhost", "[::1]") if local and not key else ()
    (_in_a_cluster if args.ray else _in_this_process)(args, models, limits=limits, key=key, hosts=hosts)
    return 0


def _in_this_process(args: argparse.Namespace, models: list[Any], **how: Any) -> None:
    if given := [flag for flag, option in _RAY.items() if getattr(args, option) is not None]:
        raise UserError(f"{given[0]} is of a server in a Ray cluster", "add --ray, or leave it out")
    import uvicorn

    from ..serving.app import create
    from ..serving.metrics import Metrics
    from ..serving.models import open_worker
    from ..studio.server import bound

    metrics, workers = Metrics(), []
    listening = bound(args.port, args.host)  # before minutes are spent on a model
    try:
        for settings in models:
            worker = open_worker(settings, metrics)
            workers.append(worker)
            if not args.quiet:
                steps = "each at its own step" if worker.row_timesteps else "at the same step"
                most = f"up to {worker.shapes.most} rows in a UNet call, {steps}"
                unet = worker.pipeline.engines["unet"].description
                print(f"{worker.name}: {unet}; {most if worker.share else 'one image at a time'}", file=sys.stderr)
        app = create(workers, metrics, **how)
        level = "info" if args.verbose else "warning"
        config = uvicorn.Config(app, args.host, args.port, log_level=level, timeout_graceful_shutdown=30)
        listening.listen()  # whoever reads the address may ask at once
        _announce(args, listening.getsockname()[1], [settings.name for settings in models])
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has shut down in order, and raises the signal again
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        listening.close()
        for worker in workers:
            worker.close(0)


def _in_a_cluster(args: argparse.Namespace, models: list[Any], **how: Any) -> None:
    if find_spec("ray") is None:
        raise MissingPackage("ray", "accel serve --ray", "ray")
    from ..serving.cluster import deploy
    from ..serving.cluster.scale import Scale
    from ..studio.server import bound

    scale = Scale.of(args.replicas or "1", args.cpus_per_replica, args.gpus_per_replica)
    known = [(one, one.digest) for one in models]
    with deploy.joined(args.ray_address) as cluster:
        scale = deploy.settle(scale, cluster, len(models), models[0].options.get("device"))
        known = [(replace(one, options={"threads": int(scale.cpus)} | dict(one.options)), d) for one, d in known]
        port = args.port
        if cluster.own or not port:  # in another cluster it may be the server that is replaced
            with bound(port, args.host) as free:
                port = free.getsockname()[1]
        replaced = deploy.deploy(known, scale, cluster, host=args.host, port=port, **how)
        if not args.quiet:
            many = f"{scale.least} to {scale.most}" if scale.most > scale.least else f"{scale.least}"
            each = f"{scale.cpus:g} cores" + f" and {scale.gpus:g} GPUs" * bool(scale.gpus)
            done = "replaced" if replaced else "runs"
            print(f"{', '.join(one.name for one in models)}: {done}; {many} replicas, {each} each", file=sys.stderr)
        stays = "the command has ended, the server has not: `serve shutdown`"
        _announce(args, port, [one.name for one in models], "Ctrl-C" if cluster.own else stays, ray=cluster.address)
        if cluster.own and not args.quiet:
            print(f"--ray-address {cluster.address} puts another bundle in its place meanwhile", file=sys.stderr)
        if cluster.own:
            deploy.wait()


def _limits(args: argparse.Namespace) -> Any:
    from ..serving.limits import Limits

    limits = Limits(args.max_images, args.max_steps, args.max_side, args.max_queue, args.max_body, args.timeout)
    for name, value in vars(limits).items():
        if not value > 0:
            raise UserError(f"invalid limit: {name} = {value} (expected above 0)", "leave it out for the default")
    return limits


def _models(args: argparse.Namespace, limits: Any) -> list[Any]:
    """What is to be served, as `Settings`."""
    from ..serving.models import Settings

    engine, options = engine_of(args)
    options["safety_checker"] = not args.no_safety_checker
    named = [_named(text) for text in args.bundle]
    if len({name for name, _ in named}) < len(named):
        raise UserError("a model is named twice", "name each model once, or give each a name: NAME=MODEL")
    how = dict(
        batch=args.batch,
        fixed=args.fixed_batch,
        policy=args.policy,
        share=not args.no_step_batching,
        limits=limits,
        loras=dict(map(_lora, args.lora)),
    )
    return [Settings(name=name, model=model, engine=engine, options=options, **how) for name, model in named]


def _named(text: str) -> tuple[str, str]:
    """Name and model of "NAME=MODEL", or of a model, which is its own name."""
    name, equals, model = text.partition("=")
    return (name, model) if equals and name and model and not os.path.exists(text) else (text, text)


def _lora(text: str) -> tuple[str, str]:
    name, _, file = text.partition("=")
    if not name or not os.path.exists(file):
        raise UserError(f"--lora {text}: there is no such file", "--lora NAME=FILE")
    return name, file


def _announce(args: argparse.Namespace, port: int, names: list[str], end: str = "Ctrl-C", **more: str) -> None:
    """Say where the server is, and what ends it."""
    host = f"[{args.host}]" if ":" in args.host else args.host
    if args.json:
        print(json.dumps({"url": f"http://{host}:{port}", "models": names, **more}), flush=True)
    elif not args.quiet:
        print(f"http://{host}:{port}/v1 (OpenAI), http://{host}:{port} (A1111); {end} ends it", file=sys.stderr)
