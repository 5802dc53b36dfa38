"""Bundles that somebody has damaged or forged, and what becomes of them: run by `test_mutations.py` as a program.

    python mutations.py WORK FIRST COUNT ENGINE[,ENGINE]

An engine, or `source`: then it is the folder of a pipeline that is damaged, and taken in as an export does.

It prints a JSON line for every bundle. Each is opened, verified and made an image with in a fork of its own, so that a
crash, a hang or a hunger for memory is seen from outside. The seed of a bundle is its number: any can be made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

SECONDS, MORE_MEMORY = 20.0, 1 << 30
ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 1 << 31, 1 << 63, -(1 << 63), 10**30, 0.5, -0.0, 1e308, 1e-308),
    *(float("nan"), float("inf"), "", "x", "../../x", "/dev/zero", "a" * 5000, "\0", "\x1b[2J", "\ud800", "\u202e"),
    *("unet", "float64", "int8", [], {}, [[]], [0], [-1], ["x"], {"x": 1}, {"min": 1}, [1] * 1000),
]


def mutate(bundle: Path, seed: int) -> dict[str, Any]:
    """Change a bundle by its seed; returns what was done, and whether its digests match again."""
    rng = random.Random(seed)
    entries = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    is_bundle = "accel.json" in entries
    entries = [entry for entry in entries if entry != "accel.json"]
    kind = rng.choices(("bytes", "json", "onnx", "weights", "place", "text"), (4, 6, 5 * is_bundle, 4, 2, 1))[0]
    suffixes = {"json": ".json", "onnx": ".onnx", "weights": ".safetensors", "text": ".txt"}
    chosen = [e for e in entries + ["accel.json"] * is_bundle if e.endswith(suffixes.get(kind, ""))]
    entry = "accel.json" if is_bundle and kind == "json" and rng.random() < 0.6 else rng.choice(chosen)
    path, times = bundle / entry, rng.choice((1, 1, 2, 5))
    data = path.read_bytes()
    changed = {"bytes": _bytes, "json": _json, "onnx": _onnx, "weights": _weights, "text": _text}
    if kind == "place":
        what = _place(bundle, path, entries, rng)
    else:
        what = f"{kind} x{times}"
        for _ in range(times):
            data = changed[kind](data, rng)
        path.unlink()
        path.write_bytes(data)
    sealed = not is_bundle or rng.random() < 0.6  # a pipeline's folder has no digests
    if sealed and is_bundle:
        _seal(bundle)
    return {"seed": seed, "entry": entry, "what": what, "sealed": sealed, "manifest": entry == "accel.json"}


def _seal(bundle: Path) -> None:
    """Sizes and digests as the files are now, as far as the manifest still is one."""
    path = bundle / "accel.json"
    try:
        data = json.loads(path.read_bytes())
        for entry in data["files"]:
            file = bundle / entry
            if file.is_file() and not file.is_symlink():
                content = file.read_bytes()
                data["files"][entry] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        text = json.dumps(data)
    except Exception:
        return
    path.unlink()
    path.write_text(text)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 100, 5000))
    how = rng.randrange(6)
    if how == 0 and data:
        held = bytearray(data)
        held[at % len(data)] ^= 1 << rng.randrange(8)
        return bytes(held)
    part = (rng.randbytes(size), b"\0" * size, b"\xff" * size, data[:size], b"", data[at : at + size])[rng.randrange(6)]
    if how == 1:
        return data[:at]
    if how == 2:
        return data[:at] + part + data[at:]
    if how == 3:
        return data[:at] + data[at + size :]
    return data[:at] + part + data[at + len(part) :]


def _json(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except ValueError:
        return _bytes(data, rng)
    return json.dumps(_changed(value, rng)).encode()


def _changed(value: Any, rng: random.Random) -> Any:
    """The value with one change at a random place in it."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
            return value * rng.choice((-1, 0, 2, 1000)) + rng.choice((0, 1, -1))
        return rng.choice(ODD)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    how = rng.random()
    held = dict(value) if isinstance(value, dict) else list(value)
    if how < 0.06:
        del held[key]
    elif how < 0.1:
        other = rng.choice(keys)
        held[key], held[other] = held[other], held[key]
    elif how < 0.14:
        if isinstance(held, dict):
            held[rng.choice([odd for odd in ODD if isinstance(odd, str)])] = held.pop(key)
        else:
            held.append(held[key])
    else:
        held[key] = _changed(value[key], rng)
    return held


def _weights(data: bytes, rng: random.Random) -> bytes:
    """A change in the header of a safetensors file, or in its data."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
    except (struct.error, ValueError):
        return _bytes(data, rng)
    how = rng.random()
    if how < 0.6:
        text = json.dumps(_changed(header, rng)).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]
    if how < 0.8:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 1 << 40, (1 << 64) - 1))) + data[8:]
    return data[: 8 + length] + _bytes(data[8 + length :], rng)


def _onnx(data: bytes, rng: random.Random) -> bytes:
    import onnx

    try:
        model = onnx.ModelProto.FromString(data)
        graph = model.graph
        how = rng.randrange(12)
        node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
        if how == 0:
            node.op_type = rng.choice(
                ("Loop", "If", "Expand", "ConstantOfShape", "Tile", "Gather", "Softmax", "Add", "X")
            )
        elif how == 1:
            node.input[:] = rng.sample(list(node.input), len(node.input))
        elif how == 2 and node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.i = rng.choice((-1, 0, 1 << 40, 7))
            attribute.ints[:] = [rng.choice((-1, 0, 1, 3, 1 << 40)) for _ in attribute.ints]
        elif how == 3:
            tensor.dims[:] = [rng.choice((0, 1, -1, 3, 1 << 20, 1 << 50)) for _ in range(rng.randrange(6))]
        elif how == 4:
            tensor.data_type = rng.randrange(24)
        elif how == 5 and (outside := [t for t in graph.initializer if t.external_data]):
            held = rng.choice(rng.choice(outside).external_data)
            held.value = rng.choice(("*/_ORT_MEM_ADDR_/*", "/dev/zero", "../x", "0", "-1", str(1 << 62), "x", "4096"))
        elif how == 6:
            del graph.node[rng.randrange(len(graph.node))]
        elif how == 7:
            graph.node.add().CopyFrom(node)
        elif how == 8:
            value = rng.choice([*graph.input, *graph.output])
            value.name = rng.choice(("", "sample", "x", value.name + "\x1b"))
        elif how == 9:
            value = rng.choice([*graph.input, *graph.output])
            for dim in value.type.tensor_type.shape.dim:
                dim.dim_value = rng.choice((-1, 0, 1, 1 << 40))
        elif how == 10:
            model.opset_import[0].version = rng.choice((-1, 0, 1, 12, 17, 19, 21, 1 << 40))
        else:
            # A small constant, such as a shape, an axis or a pad.
            small = [t for t in graph.initializer if t.raw_data and t.data_type == 7 and len(t.raw_data) <= 64]
            if small:
                held = rng.choice(small)
                count = len(held.raw_data) // 8
                values = [rng.choice((-1, 0, 1, 2, 5, 1000, 1 << 16, 1 << 31, (1 << 63) - 1)) for _ in range(count)]
                held.raw_data = struct.pack(f"<{count}q", *values)
        return model.SerializeToString()
    except Exception:  # mutated before, and no graph any more
        return _bytes(data, rng)


def _text(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = rng.choice(
        (b"", b"a b c", b"a", b"\xff\xfe", b"x" * 100_000, lines[rng.randrange(len(lines))], b"\0 \0")
    )
    return b"\n".join(lines)


def _place(bundle: Path, path: Path, entries: list[str], rng: random.Random) -> str:
    """Something else where a file should be."""
    what = rng.choice(("gone", "empty", "pipe", "device", "folder", "link outside", "link to itself", "another file"))
    content = path.read_bytes()
    path.unlink()
    if what == "empty":
        path.write_bytes(b"")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "folder":
        path.mkdir()
    elif what == "link outside":
        path.symlink_to("/etc/hostname")
    elif what == "link to itself":
        path.symlink_to(path.name)
    elif what == "another file":
        other = bundle / rng.choice(entries)
        path.write_bytes(other.read_bytes() if other != path else content[::-1])
    return what


def use(bundle: Path, engine: str) -> str:
    """What a user does with a bundle: look at it, and make an image. Returns the digest of the image."""
    import contextlib
    import io

    import accel
    from accel.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        main(["inspect", str(bundle)])
    said = out.getvalue() + err.getvalue()
    assert "Traceback" not in said, said[-3000:]
    assert all(char.isprintable() or char == "\n" for char in said), "a control character reached the terminal"
    options = {"device": "cpu"} if engine == "eager" else {"threads": 1}
    images = accel.load(bundle, engine, **options)("a handwritten seven", seed=3, output_type="np").images
    return hashlib.sha256(images.tobytes()).hexdigest()


def take_in(folder: Path) -> str:
    """What an export does with a pipeline's folder before it traces anything. Returns the digest of the networks."""
    import tempfile

    from accel.bundle.shape_profiles import profile
    from accel.export.constants import own_sampling, pipeline_constants
    from accel.export.pipeline_files import copy_pipeline_files
    from accel.models import networks, source_networks
    from accel.models.config_files import clip_tokenizer
    from accel.models.source import open_source
    from accel.sampling.noise_schedule import NoiseSchedule
    from accel.text.tokenizer import ClipTokenizer

    source, digest = open_source(folder), hashlib.sha256()
    constants, sampling = pipeline_constants(source), own_sampling(source)
    shapes = profile("native", native=constants["native_size"])
    scales = {key: constants[key] for key in ("vae_scale", "latent_multiple")}
    shapes.dims(guidance=sampling.guidance > 1, **scales)
    NoiseSchedule.from_config(source.config("scheduler"))
    clip_tokenizer(folder / "tokenizer")("a handwritten seven")
    inputs = source_networks.UNetInputs(source_networks.own_tokens(source))
    for name in ("text_encoder", "unet", "vae_decoder"):
        network: networks.Network = getattr(source_networks, name)(source, name, inputs)
        for value in network.module.state_dict().values():
            digest.update(value.contiguous().numpy().tobytes())
    with tempfile.TemporaryDirectory() as copied:
        copy_pipeline_files(source, Path(copied))
        ClipTokenizer.from_folder(Path(copied) / "tokenizer").encode("a handwritten seven")
    return digest.hexdigest()


def outcome(bundle: Path, engine: str, cache: Path) -> dict[str, Any]:
    """`use` in a fork: {"is": "image", "refused", "traceback", "crash" or "hang", "memory": bytes, ...}."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.environ["ACCEL_CACHE"] = str(cache)
            resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.write(writing, json.dumps(_said(bundle, engine)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    until, ended = time.monotonic() + SECONDS, (0, 0, None)
    while not ended[0]:
        ended = os.wait4(child, os.WNOHANG)
        if not ended[0] and time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.wait4(child, 0)
            os.close(reading)
            return {"is": "hang", "memory": 0}
        time.sleep(0.002)
    with os.fdopen(reading, "rb") as file:
        text = file.read()
    memory = ended[2].ru_maxrss << 10
    if not text:
        return {"is": "crash", "status": os.waitstatus_to_exitcode(ended[1]), "memory": memory}
    return json.loads(text) | {"memory": memory}


def _said(bundle: Path, engine: str) -> dict[str, Any]:
    import traceback
    import warnings

    from accel.errors import UserError

    warnings.simplefilter("ignore")
    try:
        return {"is": "image", "image": take_in(bundle) if engine == "source" else use(bundle, engine)}
    except UserError as error:
        text = str(error)
        shown = all(char.isprintable() or char in "\n\t" for char in text)
        return {"is": "refused" if shown else "traceback", "text": text[:300]}
    except BaseException:
        return {"is": "traceback", "text": traceback.format_exc()[-2500:]}


def main(work: Path, first: int, count: int, engines: list[str]) -> None:
    import onnx  # noqa: F401, I001
    import onnxruntime  # noqa: F401

    import accel.pipeline  # noqa: F401
    from accel.assets import DIGITS

    if "openvino" in engines:
        import openvino  # noqa: F401
    if {"eager", "source"} & set(engines):
        import torch

        import accel.models.networks  # noqa: F401

        torch.set_num_threads(1)
    original = {engine: DIGITS / ("tiny" if engine == "source" else "tiny-1step-int8") for engine in engines}
    for engine in engines:
        honest = outcome(original[engine], engine, work / "cache")
        print(json.dumps({"honest": engine} | honest), flush=True)
    for seed in range(first, first + count):
        folder, engine = work / "bundle", engines[seed % len(engines)]
        shutil.copytree(original[engine], folder)
        done = mutate(folder, seed)
        print(json.dumps(done | {"engine": engine} | outcome(folder, engine, work / "cache")), flush=True)
        shutil.rmtree(folder)
        shutil.rmtree(work / "cache", ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(","))
