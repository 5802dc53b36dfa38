"""The C++ example, compiled and run: the same image as ours, and a refusal of changed files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import accel

FOLDER = Path(__file__).parents[2] / "examples" / "embed_cpp"
pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and (shutil.which("c++") or shutil.which("g++"))), reason="no cmake or no C++ compiler"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """`embed`, linked with the OpenVINO that the Python package brings."""
    openvino = pytest.importorskip("openvino")
    build, config = tmp_path_factory.mktemp("embed"), Path(openvino.__file__).parent / "cmake"
    quick = "-DCMAKE_BUILD_TYPE=Debug"  # half the time of an optimised one
    for command in (["-S", FOLDER, "-B", build, f"-DOpenVINO_DIR={config}", quick], ["--build", build]):
        done = subprocess.run(["cmake", *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "embed"


def embed(program, *arguments):
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def sd15_bundle(smallest_bundle) -> Path:
    """What the program does is the same for all; compiling this one takes a fraction of the time."""
    return smallest_bundle


@pytest.fixture(scope="module")
def ours(sd15_bundle):
    return accel.load(sd15_bundle, "openvino")


@pytest.fixture
def noise(tmp_path):
    made = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    made.tofile(tmp_path / "noise.f32")
    return made


@pytest.mark.parametrize("prompt", ["The CAT's 42 dogs, in 3D!", "a" * 200])
def test_it_makes_our_image(program, sd15_bundle, tmp_path, prompt, ours, noise):
    done = embed(program, sd15_bundle, prompt, tmp_path / "out.ppm", tmp_path / "noise.f32")
    assert done.returncode == 0, done.stderr
    theirs = np.asarray(Image.open(tmp_path / "out.ppm"), int)
    expected = ours(prompt, sampler="ddim", steps=4, latents=noise).images[0]
    assert np.abs(theirs - np.asarray(expected, int)).max() <= 1 and theirs.std() > 5


def test_a_few_step_bundle(program, bundle_copy, tmp_path, edit_manifest, ours, noise):
    """One step of DMD2 needs no fresh noise, so it can be compared with ours."""
    edit_manifest(bundle_copy, lambda m: m.update(sampler={"name": "dmd2", "timesteps": [399], "guidance": 0.0}))
    done = embed(program, bundle_copy, "the cat", tmp_path / "out.ppm", tmp_path / "noise.f32")
    assert done.returncode == 0, done.stderr
    expected = ours("the cat", sampler="dmd2", timesteps=[399], guidance_scale=0.0, latents=noise).images[0]
    assert np.abs(np.asarray(Image.open(tmp_path / "out.ppm"), int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.slow
def test_the_shipped_model(program, tmp_path):
    """`python -m pytest -m slow tests/test_embed_cpp.py`"""
    bundle = tmp_path / "digits"
    command = [sys.executable, "-m", "accel", "export", "digits", bundle, "--profile", "digits"]
    subprocess.run(command, check=True, capture_output=True)
    done = embed(program, bundle, "a handwritten seven", tmp_path / "seven.ppm")
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(tmp_path / "seven.ppm"), int).std() > 20


def test_changed_files_are_refused(program, bundle_copy, tmp_path):
    path = bundle_copy / "unet" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = embed(program, bundle_copy, "the cat", tmp_path / "out.ppm")
    assert done.returncode == 1 and "was changed after export" in done.stderr and not (tmp_path / "out.ppm").exists()
    assert embed(program, tmp_path, "the cat", tmp_path / "out.ppm").returncode == 1
    assert embed(program).returncode == 2


@pytest.mark.parametrize("root, defined", [("TENSORRT_ROOT", []), ("TENSORRT_RTX_ROOT", ["-DACCEL_RTX"])])
def test_the_tensorrt_variants_compile(root, defined):
    """Against the public headers, where they are installed; they are linked and run by nobody here."""
    roots = {
        "NvInfer.h": (root, *(() if defined else ("/usr", "/usr/local/tensorrt"))),
        "cuda_runtime_api.h": ("CUDA_HOME", "/usr/local/cuda", "/usr"),
    }
    flags = []
    for header, places in roots.items():
        folders = [Path(os.environ.get(place, place)) / "include" for place in places]
        found = next((folder for folder in folders if (folder / header).is_file()), None)
        if found is None:
            pytest.skip(f"no {header} in {', '.join(map(str, folders))}: set {places[0]}")
        flags.append(f"-I{found}")
    compiler = shutil.which("c++") or shutil.which("g++")
    source = FOLDER / "src" / "engine_tensorrt.cpp"
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-fsyntax-only", *defined, *flags, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_digests_are_those_of_the_standards(tmp_path):
    """The pre-flight's SHA-256 and HMAC against Python's, around every block boundary."""
    import hashlib
    import hmac

    compiler = shutil.which("c++") or shutil.which("g++")
    source = tmp_path / "digests.cpp"
    source.write_text(
        '#include "sha256.hpp"\n#include <cstdio>\nint main() { std::string d; for (int i = 0; i < 200; ++i) {'
        ' std::printf("%s %s\\n", Sha256::hex(d).c_str(), Sha256::hmac_hex(d, d).c_str()); d += char(i); } }'
    )
    subprocess.run([compiler, "-std=c++17", f"-I{FOLDER / 'src'}", source, "-o", tmp_path / "digests"], check=True)
    lines = subprocess.run([tmp_path / "digests"], capture_output=True, text=True, check=True).stdout.split("\n")
    for count, line in enumerate(lines[:200]):
        data = bytes(range(count))
        assert line == f"{hashlib.sha256(data).hexdigest()} {hmac.new(data, data, hashlib.sha256).hexdigest()}"
