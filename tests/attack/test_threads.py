"""Threads that share an engine or a pipeline get what one thread gets, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

import accel
from accel.engines import ENGINES, engine_file_engines, status

BUNDLE, THREADS = "digits/tiny-1step-int8", 8


def inputs(component, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {name: limits.min for name, limits in component.dims.items()}
    return {spec.name: np.asarray(rng.uniform(1, 9, spec.concrete(sizes)), spec.dtype) for spec in component.inputs}


def together(work, rounds: int = 3, threads: int = THREADS) -> list[list]:
    """[thread][round] of `work(thread)`, all threads at once in every round."""
    start = Barrier(threads)

    def run(thread: int) -> list:
        found = []
        try:
            for _ in range(rounds):
                start.wait(60)
                found.append(work(thread))
        except Exception:
            start.abort()  # nobody waits for a thread that has failed
            raise
        return found

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


# TensorRT's are in `tests/accel/engines/test_tensorrt.py`: they need its fake, or a GPU.
@pytest.mark.parametrize("name", [name for name in ENGINES if name not in engine_file_engines()])
def test_an_engine_shared_by_threads_gives_each_its_own_output(name):
    if not status(name).ok:
        pytest.skip(status(name).detail)
    component = "unet" if name in ("onnxruntime", "openvino") else "text_encoder"  # in torch they take a minute
    engine = accel.load_engine(BUNDLE, component, name)
    feeds = [inputs(engine.component, seed) for seed in range(THREADS)]
    if name == "compile":  # the first calls are at once too, so that threads meet in the compiler
        found = together(lambda thread: engine(**feeds[thread]), rounds=2)
        wanted = [engine(**own) for own in feeds]
    else:
        wanted = [engine(**own) for own in feeds]
        found = together(lambda thread: engine(**feeds[thread]))
    for own, rounds in zip(wanted, found, strict=True):
        for outputs in rounds:
            assert all(np.array_equal(np.asarray(outputs[key]), np.asarray(own[key])) for key in own)


# With low memory they wait for each other, and load everything again each time.
@pytest.mark.parametrize("name, low_memory, threads", [("openvino", False, THREADS), ("onnxruntime", True, 3)])
def test_a_pipeline_shared_by_threads_gives_each_its_own_latents(name, low_memory, threads):
    if not status(name).ok:
        pytest.skip(status(name).detail)

    def latents(pipeline, seed: int) -> np.ndarray:
        return pipeline("a handwritten seven", seed=seed, output_type="latent").latents

    alone = accel.load(BUNDLE, name, threads=1)
    wanted = [latents(alone, seed) for seed in range(threads)]
    shared = accel.load(BUNDLE, name, threads=1, low_memory=low_memory)
    for own, rounds in zip(
        wanted, together(lambda seed: latents(shared, seed), rounds=1, threads=threads), strict=True
    ):
        assert all(np.array_equal(own, found) for found in rounds)
