"""What NVIDIA's plugin provider for RTX cards is told: the shapes to compile for, and where to keep what it compiled.

The names and forms of its options are those of `tensorrt_rtx_provider_options.h` in its package, and of the library's
own messages.
"""

from __future__ import annotations

from ..bundle import Bundle, Component
from ..machine import version_of
from ..trt import library
from ..trt.flavours import RTX
from .built_in import cache_for, shapes

PACKAGES = ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx-cu12")


def options(bundle: Bundle, component: Component) -> dict[str, str]:
    """Profile shapes, so that one engine takes every shape of the bundle, and a runtime cache that is ours alone."""
    versions = {
        "plugin": next(filter(None, map(version_of, PACKAGES)), None),
        RTX.engine: library.installed(RTX.engine),
    }
    return {
        "nv_runtime_cache_path": str(cache_for(bundle, "onnxruntime-tensorrt-rtx", versions, component.name)),
        **shapes(component, "nv_profile"),
    }
