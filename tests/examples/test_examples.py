"""The examples are programs that people copy, so they are run as people run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(tmp_path, program, *arguments):
    done = subprocess.run(
        [sys.executable, EXAMPLES / program, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_an_image(path):
    return np.asarray(Image.open(path).convert("RGB"), float).std() > 1


def test_pipeline(tmp_path, sd15_bundle):
    run(tmp_path, "pipeline.py", sd15_bundle)
    assert is_an_image(tmp_path / "pipeline-0.png") and is_an_image(tmp_path / "pipeline-1.png")


@pytest.mark.parametrize("engine", ["onnxruntime", "eager"])
def test_engine(engine, tmp_path, sd15_bundle):
    out = run(tmp_path, "engine.py", sd15_bundle, engine)
    assert "takes encoder_hidden_states float32" in out and "(1, 4, 16, 16)" in out


def test_attach(tmp_path, sd15, sd15_bundle):
    assert "unet" in run(tmp_path, "attach.py", sd15, sd15_bundle)
    assert is_an_image(tmp_path / "attached.png")


def test_bare_onnxruntime_makes_the_same_image_as_accel(tmp_path, sd15_bundle):
    import accel

    run(tmp_path, "bare_onnxruntime.py", sd15_bundle, "the cat", "bare.png")
    theirs = np.asarray(Image.open(tmp_path / "bare.png"), int)
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    pipe = accel.load(sd15_bundle, engine="onnxruntime")
    # The example walks to alpha_bar[0] at the end, as the scheduler's set_alpha_to_one = false says.
    ours = pipe("the cat", sampler="ddim", steps=25, guidance_scale=5.0, latents=latents).images[0]
    assert np.abs(np.asarray(ours.resize((256, 256)), int) - theirs).max() <= 2


def test_the_bare_program_imports_nothing_heavy():
    source = (EXAMPLES / "bare_onnxruntime.py").read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import", "from"))}
    assert imported <= {"json", "sys", "pathlib", "numpy", "onnxruntime", "PIL", "tokenizers"}
