"""Exact folds before and after, on every CPU engine: a block of the VAE decoder's size, and whole networks.

    python benchmarks/folds.py --write                                     # the block; a minute
    python benchmarks/folds.py --bundles out/peers/ours/fp32,out/peers/ours/int8 --write   # and networks of bundles

The block is nearest-neighbour upsampling by two with the 3 x 3 convolution after it as one transposed convolution
(accel/engines/folds/upsample.py), here also as a 2 x 2 convolution whose four phases are interleaved. Networks are
timed with group normalization as a scale and a shift too; for algebra that is not applied, the share of a call that it
could save is counted. Calls take turns; the figure is the least of the rounds. `--write` makes `folds.json` and the
table of `docs/performance.md`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pages
from onnx import TensorProto, helper, numpy_helper

import accel
from accel.bundle import Bundle
from accel.engines.folds import group_norm
from accel.engines.folds.upsample import phases, transposed
from accel.export.graph.trace import example
from accel.files import write_json
from accel.machine import machine
from accel.parity import relative_l2

ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / "benchmarks" / "folds.json", ROOT / "docs" / "performance.md"
FORMS = {"as exported": "plain", "transposed convolution": "transposed", "2 x 2 convolution, interleaved": "phases"}


def block(form: str, int8: bool, channels: int, side: int) -> bytes:
    """x [1, channels, side, side] -> y [1, channels, 2 side, 2 side] as an ONNX graph."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((channels, channels, 3, 3)).astype(np.float32) / (3 * channels**0.5)
    tensors: dict[str, Any] = {"scales": np.array([1, 1, 2, 2], np.float32), "scale": np.float32(0.03)}
    tensors["zero"] = np.int8(0)
    nodes, data = [], "x"
    if form == "plain":
        same = dict(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
        nodes.append(helper.make_node("Resize", ["x", "", "scales"], ["up"], **same))
        data = "up"
    if int8:
        nodes.append(helper.make_node("QuantizeLinear", [data, "scale", "zero"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]))
        data = "dq"
    weight = {"plain": weight, "transposed": transposed(weight), "phases": phases(weight)}[form]
    axis, filters = int(form == "transposed"), "weight"
    if int8:
        others = tuple(i for i in range(4) if i != axis)
        step = np.abs(weight).max(others) / 127
        tensors |= {"weight": np.rint(weight / np.expand_dims(step, others)).astype(np.int8), "step": step}
        nodes.append(helper.make_node("DequantizeLinear", ["weight", "step"], ["w"], axis=axis))
        filters = "w"
    else:
        tensors["weight"] = weight
    pads = [1, 1, 1, 1]
    if form == "plain":
        nodes.append(helper.make_node("Conv", [data, filters], ["y"], pads=pads, kernel_shape=[3, 3]))
    elif form == "transposed":
        same = dict(pads=pads, strides=[2, 2], kernel_shape=[4, 4])
        nodes.append(helper.make_node("ConvTranspose", [data, filters], ["y"], **same))
    else:
        nodes.append(helper.make_node("Conv", [data, filters], ["all"], pads=pads, kernel_shape=[2, 2]))
        tensors["axes"] = np.array([1, 2, 3])
        for k in range(4):
            begin = np.array([k * channels, k // 2, k % 2])
            tensors |= {f"begin{k}": begin, f"end{k}": begin + [channels, side, side]}
            nodes.append(helper.make_node("Slice", ["all", f"begin{k}", f"end{k}", "axes"], [f"phase{k}"]))
        nodes.append(helper.make_node("Concat", [f"phase{k}" for k in range(4)], ["joined"], axis=1))
        nodes.append(helper.make_node("DepthToSpace", ["joined"], ["y"], blocksize=2, mode="DCR"))
    used = {name for node in nodes for name in node.input}
    value = lambda name, n: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, n, n])  # noqa: E731
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items() if name in used]
    graph = helper.make_graph(nodes, "block", [value("x", side)], [value("y", 2 * side)], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def of_torch(form: str, channels: int, side: int, x: np.ndarray) -> Callable[[], np.ndarray]:
    import torch
    import torch.nn.functional as F

    weight = next(t for t in onnx.load_from_string(block(form, False, channels, side)).graph.initializer
                  if t.name == "weight")  # fmt: skip
    w, data = torch.from_numpy(numpy_helper.to_array(weight).copy()), torch.from_numpy(x)
    if form == "plain":
        call = lambda: F.conv2d(F.interpolate(data, scale_factor=2), w, padding=1)  # noqa: E731
    elif form == "transposed":
        call = lambda: F.conv_transpose2d(data, w, stride=2, padding=1)  # noqa: E731
    else:

        def call() -> Any:
            every = F.conv2d(data, w, padding=1).view(1, 2, 2, channels, side + 1, side + 1)
            parts = [every[:, a, b, :, a : a + side, b : b + side] for a in (0, 1) for b in (0, 1)]
            return F.pixel_shuffle(torch.stack(parts, 2).flatten(1, 2), 2)

    def run() -> np.ndarray:
        with torch.inference_mode():
            return call().numpy()

    return run


def of_onnxruntime(form: str, int8: bool, channels: int, side: int, x: np.ndarray) -> Callable[[], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = machine().threads
    session = onnxruntime.InferenceSession(block(form, int8, channels, side), options, ["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})[0]


def of_openvino(form: str, int8: bool, channels: int, side: int, x: np.ndarray) -> Callable[[], np.ndarray]:
    import openvino

    config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    model = core.read_model(block(form, int8, channels, side))
    request = core.compile_model(model, "CPU", config).create_infer_request()
    return lambda: np.array(request.infer({"x": x}, share_inputs=True)[0])


def least(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Least milliseconds of each call; they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - began) * 1e3)
    return {name: round(min(values), 2) for name, values in taken.items()}


def blocks(channels: int, side: int, rounds: int) -> dict[str, Any]:
    """Engine -> form -> milliseconds, with the largest relative L2 from the form as exported."""
    x = np.random.default_rng(1).standard_normal((1, channels, side, side)).astype(np.float32)
    rows = {}
    for name, make in {
        "torch": lambda form: of_torch(form, channels, side, x),
        "ONNX Runtime": lambda form: of_onnxruntime(form, False, channels, side, x),
        "OpenVINO": lambda form: of_openvino(form, False, channels, side, x),
        "OpenVINO int8": lambda form: of_openvino(form, True, channels, side, x),
    }.items():
        calls = {title: make(form) for title, form in FORMS.items()}
        made = [call() for call in calls.values()]
        distance = max(relative_l2(other, made[0]) for other in made[1:])
        rows[name] = {"ms": least(calls, rounds), "relative_l2": distance}
        print(name, rows[name], flush=True)
    return rows


def networks(bundles: list[Path], rounds: int) -> dict[str, Any]:
    """Engines with and without folds: milliseconds and relative L2 of the UNet and the decoder."""
    rows = {}
    for path, (engine_name, dtype) in product(
        bundles, (("onnxruntime", ""), ("openvino", "fp32"), ("openvino", "bf16"))
    ):
        bundle = Bundle.open(path)
        for name in ("unet", "vae_decoder"):
            record = bundle.component(name)
            title = f"{name}, {engine_name}, {record.precision}{' bf16' if dtype == 'bf16' else ''}"
            with ExitStack() as opened:
                engines = {
                    word: opened.enter_context(_loaded(bundle, name, engine_name, dtype, word))
                    for word in (("as exported", "upsampling", "all") if dtype else ("as exported", "all"))
                }
                sizes = {dim: limits.opt for dim, limits in record.dims.items()}
                feeds = {key: value.numpy() for key, value in example(record.inputs, sizes).items()}
                made = {word: next(iter(engine(**feeds).values())) for word, engine in engines.items()}
                calls = {word: partial(engine, **feeds) for word, engine in engines.items()}
                away = relative_l2(made["all"], made["as exported"])
                rows[title] = {"ms": least(calls, rounds), "relative_l2": away}
            print(title, rows[title], flush=True)
    return rows


def _loaded(bundle: Bundle, name: str, engine: str, dtype: str, folds: str) -> Any:
    """An engine with all folds, those of upsampling alone, or none; out of no cache."""
    own = {"dtype": dtype} if dtype else {}
    with TemporaryDirectory() as cache, ExitStack() as patched:
        patched.enter_context(mock.patch.dict(os.environ, ACCEL_CACHE=cache))
        if folds == "upsampling":
            patched.enter_context(mock.patch.object(group_norm, "fold", lambda model: 0))
        return accel.load_engine(bundle, name, engine=engine, verify=False, folds=folds != "as exported", **own)


# Algebra that is not applied: what it would make a table of, or compute once. Its share of a call bounds its gain.
BOUNDS = {
    "time embedding and its projections as a table": ("time_embedding", "time_emb_proj"),
    "keys and values of the prompt once an image": ("attn2.to_k", "attn2.to_v"),
    "queries, keys and values of an image as one product": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "post-quant convolution into the next": ("post_quant_conv",),
}


def bounds(bundles: list[Path]) -> dict[str, dict[str, float]]:
    """Share of a network's time on OpenVINO, by its own counters, that the layers of each entry of `BOUNDS` take."""
    rows: dict[str, dict[str, float]] = {}
    for path in bundles:
        bundle = Bundle.open(path)
        for name in ("unet", "vae_decoder"):
            record = bundle.component(name)
            found = _shares(bundle, record)
            rows[f"{name}, {record.precision}"] = {key: share for key, share in found.items() if share}
            print(name, record.precision, found, flush=True)
    return rows


def _shares(bundle: Bundle, record: Any) -> dict[str, float]:
    import openvino

    proto = onnx.load(str(bundle.file(record.graph)), load_external_data=False)
    maker = {output: node for node in proto.graph.node for output in node.output}

    def weights(node: onnx.NodeProto, depth: int = 4) -> str:
        """The names of the initializers that a node reads, through what rounds or turns them."""
        names = [name for name in node.input if name not in maker]
        passing = ("DequantizeLinear", "Transpose", "Cast", "Reshape")
        above = [maker[name] for name in node.input if name in maker and maker[name].op_type in passing]
        return " ".join([*names, *(weights(other, depth - 1) for other in above if depth)])

    layers = {node.name: weights(node) for node in proto.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")}
    config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": "YES"}
    request = openvino.compile_model(str(bundle.file(record.graph)), "CPU", config).create_infer_request()
    sizes = {dim: limits.opt for dim, limits in record.dims.items()}
    feeds = {key: value.numpy() for key, value in example(record.inputs, sizes).items()}
    for _ in range(3):
        request.infer(feeds)
    taken = {row.node_name: row.real_time.total_seconds() for row in request.profiling_info}
    of_layer = {key: sum(s for name, s in taken.items() if name.split("/")[0] == key) for key in layers}
    whole = sum(taken.values())
    return {
        title: sum(of_layer[key] for key, read in layers.items() if any(part in read for part in parts)) / whole
        for title, parts in BOUNDS.items()
    }


def table(document: Mapping[str, Any]) -> str:
    work = document["work"]
    size = f"{work['channels']} channels, {work['side']} to {2 * work['side']} px"
    lines = [f"| ms, {size} | " + " | ".join(FORMS) + " | gain |", "|---|" + "---|" * (len(FORMS) + 1)]
    for name, row in document["blocks"].items():
        own, *others = row["ms"].values()
        lines.append(f"| {name} | {' | '.join(f'{ms:.3g}' for ms in (own, *others))} | {own / min(others):.2f}x |")
    if document.get("networks"):
        lines += [
            "",
            "| ms, whole network | as exported | upsampling | and group norms | gain | relative L2 |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in document["networks"].items():
            ms = row["ms"]
            between = f"{ms['upsampling']:.4g}" if "upsampling" in ms else "-"
            gain = f"{ms['as exported'] / ms['all']:.2f}x | {row['relative_l2']:.1e}"
            lines.append(f"| {name} | {ms['as exported']:.4g} | {between} | {ms['all']:.4g} | {gain} |")
    if document.get("bounds"):
        rows = document["bounds"]
        lines += [
            "",
            f"| not applied: at most this share of a call | {' | '.join(rows)} |",
            "|---|" + "---|" * len(rows),
        ]
        for title in BOUNDS:
            shares = [f"{row[title]:.1%}" if title in row else "-" for row in rows.values()]
            lines.append(f"| {title} | {' | '.join(shares)} |")
    here = document["machine"]
    packages = ", ".join(f"{name} {here['packages'][name]}" for name in ("torch", "onnxruntime", "openvino"))
    return "\n".join([*lines, "", f"{here['cpu']}, {here['threads']} threads; {packages}. `{document['command']}`"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--bundles", default="", help="bundles whose UNet and decoder are timed, separated by commas")
    parser.add_argument("--write", action="store_true", help="keep the result and put the tables into the page")
    args = parser.parse_args()
    paths = [Path(p) for p in args.bundles.split(",") if p]
    command = f"python benchmarks/folds.py --channels {args.channels} --side {args.side} --rounds {args.rounds}"
    document = {
        "schema": "accel-folds/1",
        "command": command + (" --bundles ..." if args.bundles else ""),
        "machine": machine().as_dict(),
        "work": {"channels": args.channels, "side": args.side, "rounds": args.rounds},
        "blocks": blocks(args.channels, args.side, args.rounds),
        "networks": networks(paths, args.rounds),
        "bounds": bounds(paths),
    }
    print(table(document))
    if args.write:
        write_json(KEPT, document)
        pages.put(PAGE, "folds", table(document))


if __name__ == "__main__":
    main()
