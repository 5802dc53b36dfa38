"""Pipelines to bundles: ONNX export, precision, and what must be checked before an export counts.

    from accel.export import export_pipeline

    export_pipeline("my-model", "my-bundle", profile="batch=1-4,size=512", precision="fp16")

The public names need torch, and are resolved on first use.
"""

from typing import TYPE_CHECKING

from accel import _lazy_names

if TYPE_CHECKING:
    from .int8.settings import Int8Settings as Int8Settings
    from .pipeline import export_pipeline as export_pipeline

_LAZY = {"export_pipeline": "accel.export.pipeline", "Int8Settings": "accel.export.int8.settings"}
__getattr__, __dir__ = _lazy_names(__name__, _LAZY)

__all__ = [*_LAZY]
