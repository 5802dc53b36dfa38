"""The runner that apps copy, on the fake `tensorrt` and `tensorrt_rtx` modules and memory of the CPU."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import accel
from accel.bundle import Bundle
from accel.export.tensorrt.build import build
from accel.trt import library, trust

PROGRAM = Path(__file__).parents[2] / "examples" / "run_engine_file.py"


class Memory:
    """What `Torch` and `CudaPython` are to the program, on the CPU."""

    handle, gpu, capability = 7, "Fake GPU", (8, 9)

    def __init__(self):
        self.held = {}

    def space(self, name, size):
        block = np.empty(size + 256, np.uint8)
        start = -block.ctypes.data % 256
        self.held[name] = block[start : start + size]
        return self.held[name].ctypes.data

    def put(self, name, array):
        address = self.space(name, array.nbytes)
        self.held[name][:] = array.reshape(-1).view(np.uint8)
        return address

    def get(self, name, array):
        array.reshape(-1).view(np.uint8)[:] = self.held[name]


@pytest.fixture
def program():
    spec = importlib.util.spec_from_file_location("run_engine_file", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_computes_what_accel_computes_and_refuses_what_accel_refuses(program, bundle_copy, tensorrt):
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(SystemExit, match="there is none"):
        program.EngineFile(bundle_copy, "vae_decoder", Memory())
    (file,) = build(bundle, ("vae_decoder",), profiles=["batch=1,size=64", "batch=1-4,size=64-128"])
    runner = program.EngineFile(bundle_copy, "vae_decoder", Memory())
    for shape in ((1, 4, 16, 16), (3, 4, 16, 32)):
        latents = np.random.default_rng(0).standard_normal(shape, np.float32)
        wanted = accel.load_engine(bundle, "vae_decoder", "tensorrt")(latent_sample=latents)["sample"].numpy()
        assert np.array_equal(runner(latent_sample=latents)["sample"], wanted)
    with pytest.raises(SystemExit, match="no optimization profile of the engine"):
        runner(latent_sample=np.zeros((9, 4, 16, 16), np.float32))

    other = Memory()
    other.gpu = "Other GPU"
    with pytest.raises(SystemExit, match="built for Fake GPU"):
        program.EngineFile(bundle_copy, "vae_decoder", other)
    key = trust.key_file().read_bytes()
    trust.key_file().write_bytes(b"x" * 32)
    with pytest.raises(SystemExit, match="signature"):
        program.EngineFile(bundle_copy, "vae_decoder", Memory())
    trust.key_file().write_bytes(key)
    data = bytearray(file.path.read_bytes())
    data[100] ^= 1
    file.path.write_bytes(data)
    with pytest.raises(SystemExit, match="changed after it was built"):
        program.EngineFile(bundle_copy, "vae_decoder", Memory())


def test_it_runs_engine_files_of_tensorrt_rtx_on_the_cards_they_are_for(program, bundle_copy, tensorrt_rtx, tmp_path):
    bundle = Bundle.open(bundle_copy)
    (file,) = build(bundle, ("vae_decoder",), engine="tensorrt-rtx", targets=["sm86", "sm89"])
    latents = np.random.default_rng(0).standard_normal((2, 4, 16, 16), np.float32)
    wanted = accel.load_engine(bundle, "vae_decoder", "tensorrt-rtx")(latent_sample=latents)["sample"].numpy()
    calls = tensorrt_rtx._world.calls
    for compiled_before in (0, 1):  # what was compiled is kept for the next start
        calls.clear()
        runner = program.EngineFile(bundle_copy, "vae_decoder", Memory())
        assert np.array_equal(runner(latent_sample=latents)["sample"], wanted)
        assert calls.count("runtime cache") == compiled_before
    (kept,) = (tmp_path / "cache").rglob("run_engine_file/*.runtime")
    assert kept.stat().st_mode & 0o077 == 0 and file.key in kept.name
    for spoil in (lambda: kept.write_bytes(kept.read_bytes()[:-1]), lambda: kept.chmod(0o666)):
        spoil()  # damaged, or anybody's: counts as empty
        calls.clear()
        program.EngineFile(bundle_copy, "vae_decoder", Memory())
        assert "runtime cache" not in calls

    other = Memory()
    other.capability = (12, 0)
    with pytest.raises(SystemExit, match="built for sm86, sm89, here is Fake GPU"):
        program.EngineFile(bundle_copy, "vae_decoder", other)
    program.load_library = lambda engine: None
    with pytest.raises(SystemExit, match="needs TensorRT-RTX, which is not installed: pip install tensorrt-rtx"):
        program.EngineFile(bundle_copy, "vae_decoder", Memory())


@pytest.mark.parametrize(
    ("targets", "capability", "runs"), [([], (8, 0), True), ([], (7, 5), False), ([], (12, 1), True)]
)
def test_without_targets_an_engine_file_is_for_ampere_and_newer(program, targets, capability, runs):
    assert program.runs_on(targets, capability) == runs


ASKED = """
import sys, run_engine_file as program, test_run_engine_file as ours
print(program.load_library("tensorrt-rtx").__version__, flush=True)
program.EngineFile(sys.argv[1], "text_encoder", ours.Memory())
"""


@pytest.mark.skipif(library.installed("tensorrt-rtx") is None, reason="TensorRT-RTX is not installed")
def test_the_real_library_is_asked_and_says_what_is_missing(bundle_copy):
    """A real engine file, NVIDIA's real libraries: without a driver, that is where it ends, with a sentence."""
    bundle = Bundle.open(bundle_copy)
    build(bundle, ("text_encoder",), engine="tensorrt-rtx", targets=["sm89"])
    # In a process of its own: what NVIDIA's library does to one without a driver is not this one's affair.
    places = os.pathsep.join(map(str, (PROGRAM.parent, Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "-c", ASKED, bundle_copy],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": places},
    )
    assert done.stdout.strip() == library.installed("tensorrt-rtx"), done.stderr
    if library.has_driver():
        pytest.skip("there is a driver here")
    assert done.returncode == 1 and re.search("TensorRT-RTX .*(CUDA|driver)", done.stderr), done.stderr
    done = subprocess.run(
        [sys.executable, PROGRAM, bundle_copy, "text_encoder", "in", "out"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "needs an NVIDIA GPU and its driver" in done.stderr


def test_it_needs_only_what_it_says():
    imported = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "torch", "cuda"}
    assert "tensorrt" in PROGRAM.read_text() and "accel" not in imported
