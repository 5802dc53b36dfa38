"""Write a bundle as one ONNX graph from prompt to pixels, and keep it only if it draws the pipeline's images.

OUT/model.onnx             for every engine;  int8: model.uint8.onnx too, for ONNX Runtime and the browser
OUT/weights.safetensors    the weights of both
OUT/tokenizer/             how text becomes token ids [, tokenizer_2/]
OUT/single_graph.json      inputs, outputs, constants, digests, and how far its images were from the pipeline's
"""

from __future__ import annotations

import gc
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from accel._version import __version__
from accel.bundle import Bundle
from accel.bundle.tensor_spec import TensorSpec
from accel.engines.onnxruntime import OFF_FOR_INT8
from accel.errors import MissingPackage, Notice, UserError
from accel.files import SINGLE_GRAPH, new_folder, require_space, sha256, write_json
from accel.parity import psnr
from accel.pipeline.opening import load
from accel.pipeline.pipeline import tokenizers_of
from accel.pipeline.sampling_plan import plan as plan_of
from accel.safety import COMPONENT as SAFETY_CHECKER
from accel.sampling import counter_noise

from . import refusals, tokenizer
from .compose import Job, compose
from .merge import WEIGHTS, gather_weights
from .noise import model as noise_model
from .sizes import of_bundle

Progress = Callable[[str, float], None]
GRAPH, UINT8 = "model.onnx", "model.uint8.onnx"
SEED, PROMPTS = 7, ("a handwritten seven", "the cat")
# Of a pixel in [0, 1]; int8 rounds what differs by 1e-7 to one side or the other, so it is compared in dB.
LIMIT, INT8_DB = 1 / 255, 30.0


def write(
    bundle: Bundle,
    out: str | Path,
    *,
    text: bool = False,
    size: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Write the graph; the folder appears only when it is whole, and draws what the pipeline draws.

    Args:
        text: prompts as strings are the input, by the CLIP tokenizer of ONNX Runtime Extensions, which runs on ONNX
            Runtime with that library alone.
        size: height and width are inputs, within the bundle's profile.

    Returns:
        What `single_graph.json` says.

    Raises:
        UserError: for a bundle that does not become one graph, and for one whose images differ.
    """
    refusals.check(bundle)
    sizes = of_bundle(bundle.manifest, size)
    if text:
        tokenizer.library()
    bundle.verify()
    manifest = bundle.manifest
    if SAFETY_CHECKER in manifest.components:
        warnings.warn("the safety checker is not in the graph: nothing looks at its images", Notice, stacklevel=2)
    plan = plan_of(manifest, bundle.noise_schedule(), None, None, None, None, None)
    limits = manifest.components["unet"].dims.get("batch")
    images = manifest.profile.batch.min if limits is None or limits.fixed else None
    job = Job(bundle, plan, sizes, images)
    sources = {name: bundle.file(manifest.components[name].weights) for name in (*job.encoders, "unet", "vae_decoder")}
    require_space(Path(out).absolute().parent, sum(path.stat().st_size for path in sources.values()))
    with new_folder(Path(out), overwrite=overwrite) as folder:
        progress("graph", 0.0)
        models = {GRAPH: compose(job)}
        if any(part.int8.get("graphs") for part in manifest.components.values()):
            models[UINT8] = compose(replace(job, engine="onnxruntime"))
        progress("weights", 0.1)
        gather_weights(list(models.values()), sources, folder / WEIGHTS)
        for name, model in models.items():
            onnx.save(model, str(folder / name))
        onnx.checker.check_model(str(folder / GRAPH), full_check=True)
        bundle.copy(folder, "tokenizer")
        bundle.copy(folder, "tokenizer_2")
        progress("drawing with the graph", 0.3)
        drawn, seconds = _drawn(folder / (UINT8 if UINT8 in models else GRAPH), job)
        progress("drawing with the pipeline", 0.7)
        parity = _compared(job, drawn, _expected(job))
        if text:
            _take_text(folder, models, job, drawn[0])
        progress("digests", 0.95)
        record = _record(job, folder, models, parity | {"seconds": seconds}, text)
        write_json(folder / SINGLE_GRAPH, record)
    progress("done", 1.0)
    return record


def describe(out: Path, record: Mapping[str, Any]) -> str:
    """What was written, in two lines."""
    size = sum(entry["bytes"] for entry in record["files"].values()) / 1e6
    parity = record["parity"]
    equal = "the pipeline's" if not parity["largest_of_255"] else f"{parity['psnr']} dB from the pipeline's"
    names = ", ".join(spec["name"] for spec in record["inputs"])
    return (
        f"{out} is ready: {', '.join(record['graphs'])}, {size:.1f} MB in all; from {names} to an image\n"
        f"its image is {equal} (largest difference {parity['largest_of_255']:.0f} of 255)"
    )


def prompts(job: Job) -> list[str]:
    """What is drawn to compare: two images where the graph takes them."""
    limits = job.bundle.manifest.profile.batch
    count = job.images or min(max(2, limits.min), limits.max)
    return [PROMPTS[i % len(PROMPTS)] for i in range(count)]


def _drawn(graph: Path, job: Job) -> tuple[list[np.ndarray], dict[str, float]]:
    """The graph's images uint8 [N, H, W, 3] of every size that is compared, on ONNX Runtime's CPU provider; and the
    seconds of loading, and of drawing the usual size."""
    start = time.perf_counter()
    session = onnxruntime_session(str(graph), OFF_FOR_INT8 if graph.name == UINT8 else [])
    times, images = [start, time.perf_counter()], []
    for size in job.sizes.drawn:
        images += session.run(None, feeds(job, prompts(job), size))
        times.append(time.perf_counter())
    del session
    gc.collect()
    load, draw = (round(times[i + 1] - times[i], 3) for i in (0, 1))
    return images, {"load": load, "draw": draw}


def onnxruntime_session(graph: str | bytes, off: Sequence[str] = (), operators: str = "") -> Any:
    """A graph on ONNX Runtime's CPU provider, with a library of further operators."""
    try:
        import onnxruntime as ort
    except ImportError:
        raise MissingPackage("onnxruntime", "checking a single graph", "cpu") from None
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = _threads()
    if operators:
        options.register_custom_ops_library(operators)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(off))


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or 0)


def feeds(job: Job, texts: list[str], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """The inputs of the graph for some prompts, seeds from `SEED` on."""
    made: dict[str, np.ndarray] = {}
    for name, encode in tokenizers_of(job.bundle, job.encoders).items():
        ids = name.replace("text_encoder", "input_ids")
        made[ids] = encode(texts)
        if job.negative:
            made[f"negative_{ids}"] = encode([""] * len(texts))
    return made | _numbers(job, len(texts), size)


def _numbers(job: Job, images: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    sides = {spec.name: np.array([side], np.int32) for spec, side in zip(job.sizes.inputs, size, strict=False)}
    return {"seed": np.arange(SEED, SEED + images, dtype=np.int32)} | sides


def _expected(job: Job) -> list[np.ndarray]:
    """The pipeline's images of the same seeds and sizes, float32 [N, H, W, 3] in [0, 1].

    Int8 gets the noise of the graph's own nodes: an input that differs by 1e-7 can round to the other side, and then
    the images of one graph differ by as much as those of two.
    """
    texts, made = prompts(job), []
    with load(job.bundle, engine="onnxruntime", device="cpu", threads=_threads()) as pipe:
        for size in job.sizes.drawn:
            noise = _noise(job, len(texts), job.latents(size))
            call = {"latents": noise(0), "renoise": lambda i, noise=noise: noise(i + 1)}
            made.append(pipe(texts, **call, output_type="np", progress=False).images)
    return made


def _noise(job: Job, images: int, shape: tuple[int, int, int]) -> Callable[[int], np.ndarray]:
    """draw -> noise float32 [images, *shape]."""
    seeds = np.arange(SEED, SEED + images, dtype=np.int32)
    if not job.quantized:
        return lambda draw: counter_noise.normal(seeds.tolist(), draw, shape)
    made = noise_model(job.draws, int(np.prod(shape))).SerializeToString()
    (drawn,) = onnxruntime_session(made).run(["noise"], {"seed": seeds})
    return lambda draw: drawn.reshape(images, -1, *shape)[:, job.draws.index(draw)]


def _compared(job: Job, drawn: list[np.ndarray], expected: list[np.ndarray]) -> dict[str, Any]:
    """How far the images are from the pipeline's, where they are farthest.

    Raises:
        UserError: above the limit.
    """
    worst: dict[str, Any] = {"largest_of_255": 0.0, "psnr": math.inf}
    for size, own, image in zip(job.sizes.drawn, drawn, expected, strict=True):
        own, rounded = own.astype(np.float32), (image * 255).round()
        largest, decibels = float(np.abs(own - rounded).max()), psnr(own, rounded, 255.0)
        if decibels < INT8_DB if job.quantized else largest > 255 * LIMIT:
            raise UserError(
                f"the graph's images of {size[0]} x {size[1]} differ from the pipeline's by {largest:.0f} of 255 "
                f"({decibels:.1f} dB)",
                "report the model; accel run draws with the bundle itself",
            )
        worst = {"largest_of_255": max(worst["largest_of_255"], largest), "psnr": min(worst["psnr"], decibels)}
    return worst | {"psnr": round(worst["psnr"], 1) if math.isfinite(worst["psnr"]) else None}


def _of_text(job: Job) -> list[TensorSpec]:
    names = ["prompt"] + ["negative_prompt"] * job.negative
    return [*(TensorSpec(name, "string", (job.rows,)) for name in names), *job.numbers]


def _take_text(folder: Path, models: Mapping[str, onnx.ModelProto], job: Job, drawn: np.ndarray) -> None:
    """Make text the input, and compare what is drawn then.

    Raises:
        UserError: where it is another image.
    """
    for name, model in models.items():
        tokenizer.add(model, job.bundle, tokenizers_of(job.bundle, job.encoders))
        onnx.save(model, str(folder / name))
    graph = folder / list(models)[-1]
    session = onnxruntime_session(str(graph), OFF_FOR_INT8 if graph.name == UINT8 else [], tokenizer.library())
    texts = prompts(job)
    given = {"prompt": texts} | ({"negative_prompt": [""] * len(texts)} if job.negative else {})
    inputs = {name: np.array(values, object) for name, values in given.items()}
    (images,) = session.run(None, inputs | _numbers(job, len(texts), job.sizes.usual))
    if not np.array_equal(images, drawn):
        raise UserError("the tokenizer in the graph gives other ids than the model's own", "leave --text-input out")


def _record(job: Job, folder: Path, models: Iterable[str], parity: Mapping[str, Any], text: bool) -> dict[str, Any]:
    manifest = job.bundle.manifest
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "schema": 1,
        "accel": __version__,
        "source": dict(manifest.source),
        "bundle": job.bundle.digest,
        "precision": manifest.precision,
        "graphs": list(models),
        "inputs": [asdict(spec) for spec in (_of_text(job) if text else job.inputs)],
        "outputs": [asdict(job.output)],
        "profile": {name: asdict(limits) for name, limits in job.profile.items()},
        "sampler": dict(manifest.sampler),
        "timesteps": list(job.plan.timesteps),
        "guidance": job.plan.guidance,
        "noise": {"generator": "philox4x32-10, box-muller", "draws": job.draws},
        "text": text,
        "parity": {"engine": "onnxruntime", "images": len(prompts(job)), "sizes": job.sizes.drawn, **parity},
        "files": {
            path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in written
        },
    }
