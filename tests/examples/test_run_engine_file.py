"""The runner that apps copy, on the fake `tensorrt` module and memory of the CPU."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import accel
from accel.bundle import Bundle
from accel.export.tensorrt.build import build
from accel.trt import trust

PROGRAM = Path(__file__).parents[2] / "examples" / "run_engine_file.py"


class Memory:
    """What `Torch` and `CudaPython` are to the program, on the CPU."""

    handle, gpu = 7, "Fake GPU"

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
def program(tensorrt):
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


def test_it_needs_only_what_it_says():
    imported = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    standard = {"hashlib", "hmac", "json", "os", "pathlib", "sys"}
    assert imported - standard == {"numpy", "tensorrt", "torch", "cuda"}
