"""torch.compile: the honest baseline that costs a user one line. Compilation happens on the first call of a shape."""

from __future__ import annotations

import shutil
import threading
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

from ..bundle import Bundle, Component
from ..errors import Notice, UserError
from . import eager
from .base import Status

FACTS = replace(eager.FACTS, auto=())  # never by itself: its first call takes minutes
# torch's compiler keeps state for the whole process: a second thread that enters it fails, or compiles again.
_TURN = threading.Lock()
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def status() -> Status:
    base = eager.status()
    if not base.ok:
        return base
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return Status(False, "torch.compile needs a C++ compiler", "apt-get install g++")
    return base


def attempt() -> str:
    """A small function compiled where eager runs: that is when a missing compiler shows."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.compile(lambda x: (x @ x).relu() + 1)(torch.ones(2, 2, device=device)).cpu()
    return device


@cache
def _note_compiling() -> None:
    """Say once why nothing seems to happen."""
    text = "torch.compile is compiling: the first call of each network takes up to minutes, later ones do not"
    warnings.warn(text, Notice, stacklevel=6)


class Compile(eager.Eager):
    """`torch.compile` of the eager module.

    Args:
        mode: as in torch.compile.
        dynamic: compile once for all sizes instead of once per size.
    """

    name = "compile"

    def __init__(
        self, bundle: Bundle, component: Component, *, mode: str = "default", dynamic: bool = False, **options: Any
    ):
        if mode not in MODES:
            raise UserError(f"unknown torch.compile mode {mode!r}", f"one of: {', '.join(MODES)}")
        super().__init__(bundle, component, **options)
        import torch

        self.module = torch.compile(self.module, mode=mode, dynamic=dynamic)
        self.description += f", torch.compile {mode}"
        self._called = False

    def run(self, feeds):
        if not self._called:
            self._called = True
            _note_compiling()
        with _TURN:
            outputs = super().run(feeds)
            if not self.device.startswith("cuda"):
                return outputs
            # With CUDA graphs the next call overwrites what this one returned.
            return {name: value.clone() for name, value in outputs.items()}


def load(bundle: Bundle, component: Component, **options: Any) -> Compile:
    return Compile(bundle, component, **options)
