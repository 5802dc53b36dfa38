"""Pipelines to bundles: ONNX export, precision, and what must be checked before an export counts.

`accel.export.export_pipeline` is resolved on first use: it needs torch.
"""

from typing import Any

__all__ = ["export_pipeline"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from .pipeline import export_pipeline

        return export_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
