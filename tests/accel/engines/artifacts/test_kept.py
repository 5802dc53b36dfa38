"""What torch.compile made is used by the next process, and nothing that is damaged or somebody else's."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import accel
from accel.bundle import Bundle
from accel.engines.artifacts import kept
from accel.errors import Notice

PROGRAM = """
import os, sys, warnings, torch
from pathlib import Path
from torch._dynamo.utils import counters
from accel.engines.artifacts import kept

warnings.simplefilter("always")
call = torch.compile(lambda x: (x @ x).relu() + 1)
value = kept.compiled(Path(sys.argv[1]), lambda: call(torch.ones(3, 3)))
assert torch.equal(value, torch.full((3, 3), 4.0))
found = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
ran = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "compiled"
own = [line for line in ran.read_text().splitlines() if ".main.cpp" in line] if ran.exists() else []
print("hit" if found else "miss", "compiled" if own else "loaded")
"""


@pytest.fixture
def process(tmp_path):
    """process(folder): what the program says in a fresh process with an empty cache of torch's own there."""

    def process(folder: str) -> tuple[str, str]:
        (own := tmp_path / folder).mkdir()
        compiler = tmp_path / "c++"
        compiler.write_text(f'#!/bin/sh\necho "$@" >> {own}/compiled\nexec g++ "$@"\n')
        compiler.chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "kept" / "a.bin")],
            env=os.environ
            | {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(own), "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    return process


def test_the_next_process_finds_it_and_a_damaged_or_foreign_file_is_made_again(process, tmp_path):
    file = tmp_path / "kept" / "a.bin"
    assert process("one")[0] == "miss compiled" and file.stat().st_mode & 0o777 == 0o600
    assert process("two")[0] == "hit loaded"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    said, note = process("three")
    assert said == "miss compiled" and "is damaged: the network is compiled again" in note
    file.chmod(0o666)
    said, note = process("four")
    assert said == "miss compiled" and "can be written by others" in note
    assert process("five")[0] == "hit loaded"


def test_a_file_is_of_one_bundle_shape_and_set_of_options(smallest_bundle, monkeypatch):
    bundle = Bundle.open(smallest_bundle)
    names = {
        kept.path_for(bundle, "unet", {"mode": "default"}, {"batch": 1}, ""),
        kept.path_for(bundle, "unet", {"mode": "default"}, {"batch": 2}, ""),
        kept.path_for(bundle, "unet", {"mode": "max-autotune"}, {"batch": 1}, ""),
        kept.path_for(bundle, "vae_decoder", {"mode": "default"}, {"batch": 1}, ""),
        kept.path_for(bundle, "unet", {"mode": "default"}, {"batch": 1}, "NVIDIA L4"),
    }
    monkeypatch.setattr(kept, "version_of", lambda name: "9.9")
    names.add(kept.path_for(bundle, "unet", {"mode": "default"}, {"batch": 1}, ""))
    assert len(names) == 6 and all(bundle.digest[:32] in str(name) for name in names)


def test_the_engine_keeps_each_shape_once_and_goes_on_without_a_place(smallest_bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda module, **how: module)
    asked = []
    monkeypatch.setattr(kept, "compiled", lambda path, call: asked.append(path) or call())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        engine = accel.load_engine(smallest_bundle, "text_encoder", "compile", device="cpu")
        for rows in (1, 2, 1):
            engine(input_ids=np.ones((rows, 77), np.int64))
        assert len(set(asked)) == len(asked) == 2
        engine = accel.load_engine(smallest_bundle, "text_encoder", "compile", device="cpu", cache=False)
        engine(input_ids=np.ones((1, 77), np.int64))
    assert len(asked) == 2


def test_without_a_place_to_write_it_just_runs(tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert kept.compiled(tmp_path / "file" / "a.bin", lambda: 7) == 7
