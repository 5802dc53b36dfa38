"""torch.compile: what it needs is looked for before the first call, and its modes are torch's."""

from __future__ import annotations

import sysconfig

import pytest
import torch

import accel
from accel.engines import compile as engine
from accel.errors import UserError


def test_header_files_of_python_are_looked_for(monkeypatch, tmp_path):
    """Triton compiles a C program for each kernel, and inductor C++ for a CPU; both include Python.h."""
    assert engine.status().ok
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    state = engine.status()
    assert not state.ok and "Python.h" in state.detail and "python3-dev" in state.fix


@pytest.fixture
def compiled(monkeypatch):
    """What torch.compile is asked for; nothing is compiled."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **how: asked.append((type(module).__name__, how)) or module)
    return asked


def test_modes_are_torchs(compiled, smallest_bundle):
    unet = accel.load_engine(smallest_bundle, "unet", "compile", mode="max-autotune")
    assert compiled[0][1]["mode"] == "max-autotune" and "torch.compile max-autotune" in unet.description
    with pytest.raises(UserError, match="unknown torch.compile mode 'fast'"):
        accel.load_engine(smallest_bundle, "unet", "compile", mode="fast")


def test_regional_compiles_the_blocks_that_are_alike_and_networks_without_them_whole(smallest_bundle, monkeypatch):
    blocks = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: blocks.append(type(self).__name__))
    unet = accel.load_engine(smallest_bundle, "unet", "compile", regional=True)
    assert set(blocks) == {"BasicTransformerBlock"} and "of repeated blocks" in unet.description
    whole = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: whole.append(module) or module)
    text = accel.load_engine(smallest_bundle, "text_encoder", "compile", regional=True)
    assert len(whole) == 1 and "repeated" not in text.description
