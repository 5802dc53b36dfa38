"""AOTInductor: a network that torch compiled ahead of time, in one file that needs no model code to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...bundle import Bundle, Component
from ..base import Facts, Status
from .place import Here, here, status

if TYPE_CHECKING:
    from .engine import AOTInductor

FACTS = Facts(
    dtypes=("bf16",),  # of files that were built for it; without it the bundle's own
    devices={"cpu": {"device": "cpu"}, "cuda": {"device": "cuda"}},
    libraries=("torch", "torch._inductor"),
    options=("device", "dtype", "engine_file"),
    engine_files=True,
    auto=(),  # `accel tune` compares its speed with that of the others
    variants=(),
)

__all__ = ["FACTS", "Here", "Status", "here", "load", "status"]


def load(bundle: Bundle, component: Component, **options: Any) -> AOTInductor:
    from .engine import AOTInductor

    return AOTInductor(bundle, component, **options)
