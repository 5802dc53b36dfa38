"""torch.compile: the honest baseline that costs a user one line. Compilation happens on the first call of a shape."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from typing import Any

from ..bundle import Bundle, Component
from ..errors import UserError
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

    def run(self, feeds):
        with _TURN:
            outputs = super().run(feeds)
            if not self.device.startswith("cuda"):
                return outputs
            # With CUDA graphs the next call overwrites what this one returned.
            return {name: value.clone() for name, value in outputs.items()}


def load(bundle: Bundle, component: Component, **options: Any) -> Compile:
    return Compile(bundle, component, **options)
