"""accel: distil, export, compile and measure Stable Diffusion.

Importing this package loads neither torch nor diffusers; each name below is resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _moved
from ._version import __version__
from .errors import UserError

if TYPE_CHECKING:
    from .bundle import Bundle as Bundle
    from .engines import load_engine as load_engine
    from .pipeline import Pipeline as Pipeline
    from .pipeline import load as load
    from .pipeline.attach import attach as attach

_LAZY = {
    "load": "accel.pipeline",
    "load_engine": "accel.engines",
    "attach": "accel.pipeline.attach",
    "Bundle": "accel.bundle",
    "Pipeline": "accel.pipeline",
}

_moved.install()

__all__ = ["UserError", "__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'accel' has no attribute {name!r}")
