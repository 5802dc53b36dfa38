"""torch.compile: the honest baseline that costs a user one line. Compilation happens on the first call of a shape."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import threading
import warnings
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..bundle import Bundle, Component
from ..errors import Notice, UserError
from ..trt.cuda import Cuda, index_of
from . import eager
from .artifacts import kept
from .base import Status

# torch's compiler keeps state for the whole process: a second thread that enters it fails, or compiles again.
_TURN = threading.Lock()
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_CAPTURING = ("reduce-overhead", "max-autotune")  # with CUDA graphs of torch's own, on a GPU
FACTS = replace(
    eager.FACTS,
    auto=(),  # never by itself: its first call takes minutes
    devices=eager.FACTS.devices | {mode: {"mode": mode} for mode in MODES[1:]} | {"regional": {"regional": True}},
    gpu_variants=("fp16", "fp16:loop", "fp16:max-autotune"),
)


def status() -> Status:
    base = eager.status()
    if not base.ok:
        return base
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return Status(False, "torch.compile needs a C++ compiler", "apt-get install g++")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        fix = f"apt-get install python3-dev (of Python {version})"
        return Status(False, "torch.compile needs Python's header files (Python.h)", fix)
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
        regional: compile a transformer block once and use it for all that are alike, and leave the rest to eager torch:
            a fraction of the time of the first call. Networks without such blocks are compiled whole.
        cache: keep what was compiled in accel's cache, for the next process (`artifacts.kept`).
    """

    name = "compile"

    def __init__(
        self,
        bundle: Bundle,
        component: Component,
        *,
        mode: str = "default",
        dynamic: bool = False,
        regional: bool = False,
        cache: bool = True,
        **options: Any,
    ):
        if mode not in MODES:
            raise UserError(f"unknown torch.compile mode {mode!r}", f"one of: {', '.join(MODES)}")
        if mode in _CAPTURING and options.get("cuda_graph", "off") != "off":
            raise UserError(f"torch.compile's mode {mode} captures CUDA graphs itself", "leave --cuda-graph out")
        if options.get("offload") == "sequential" or mode in _CAPTURING and options.get("offload"):
            raise UserError(
                "what torch.compile makes of a network needs all of its weights at once"
                + (f", and mode {mode} always at the same place" if mode in _CAPTURING else ""),
                "--offload model with the default mode; or --engine eager",
            )
        super().__init__(bundle, component, **options)
        import torch

        how, model = dict(mode=mode, dynamic=dynamic), self.module.model
        regional = regional and bool(getattr(model, "_repeated_blocks", None))
        if regional:
            model.compile_repeated_blocks(**how)
        else:
            self.module = torch.compile(self.module, **how)
        self.description += f", torch.compile {mode}" + (" of repeated blocks" if regional else "")
        chosen = {name: value for name, value in options.items() if name != "weights"}
        self._kept = partial(
            kept.path_for,
            bundle,
            component.name,
            how | {"regional": regional, "device": self.device, "dtype": str(self.dtype)} | chosen,
            gpu=Cuda(index_of(self.device) or 0).gpu.name if self.device.startswith("cuda") else "",
        )
        self._cache, self._shapes = cache, set[tuple[Any, ...]]()
        self._captures = mode in _CAPTURING and self.device.startswith("cuda")

    def run(self, feeds):
        sizes = self.sizes(feeds)
        with _TURN:
            if (shape := tuple(sorted(sizes.items()))) in self._shapes:
                outputs = super().run(feeds)
            else:
                _note_compiling()
                run = partial(super().run, feeds)
                outputs = kept.compiled(self._kept(sizes), run) if self._cache else run()
                self._shapes.add(shape)
            # With torch's CUDA graphs the next call overwrites what this one returned.
            return {name: value.clone() for name, value in outputs.items()} if self._captures else outputs


def load(bundle: Bundle, component: Component, **options: Any) -> Compile:
    return Compile(bundle, component, **options)
