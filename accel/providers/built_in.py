"""The providers inside ONNX Runtime, and what the GPU ones are told: where to cache, which shapes to expect, how exact
to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundle import Bundle, Component
from ..errors import UserError
from ..files import cache_dir, digest_of
from ..machine import machine, version_of
from ..trt import library, trust

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


def chain(
    provider: str, device_id: int, bundle: Bundle, component: Component, own: Mapping[str, Any] | None = None
) -> list:
    """The chosen provider with its options, then what it may hand operators to.

    Args:
        own: options of the chosen provider by ONNX Runtime's names, instead of ours.
    """
    own = dict(own or {})
    if provider == "cpu":
        if own:
            raise UserError("the cpu provider takes no provider options", "use provider cuda or tensorrt")
        return [PROVIDERS["cpu"]]
    cuda = {"device_id": device_id, "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    if provider == "cuda":
        return [(PROVIDERS["cuda"], cuda | own), PROVIDERS["cpu"]]
    options = tensorrt(device_id, bundle, component) | own
    return [(PROVIDERS["tensorrt"], options), (PROVIDERS["cuda"], cuda), PROVIDERS["cpu"]]


def tensorrt(device_id: int, bundle: Bundle, component: Component) -> dict[str, Any]:
    """Options of the TensorRT provider: engine and timing cache, the profile's shapes, the graph's precision."""
    cache = cache_for(bundle, "onnxruntime-tensorrt", {"tensorrt": library.installed()}, gpu=device_id)
    return {
        "device_id": device_id,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(cache),
        "trt_engine_cache_prefix": component.name,
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(cache.parent.parent),
        "trt_context_memory_sharing_enable": True,
        # ONNX Runtime hands over the weights: copied into the graph they may exceed the 2 GB of a protobuf.
        "trt_load_user_initializer": True,
        # TensorRT 10 reads these on weakly typed networks; for 11 the graph alone decides.
        "trt_fp16_enable": component.dtype == "float16",
        "trt_int8_enable": component.format == "int8",
        **shapes(component),
    }


def shapes(component: Component, prefix: str = "trt_profile") -> dict[str, str]:
    """The three profile options, so that one engine takes every shape instead of one being built for each.

    Args:
        prefix: how the provider's names of these options begin.
    """
    ends = {}
    for end in ("min", "opt", "max"):
        sizes = {name: getattr(limits, end) for name, limits in component.dims.items()}
        free = [s for s in component.inputs if any(isinstance(d, str) and not component.dims[d].fixed for d in s.shape)]
        text = ",".join(f"{s.name}:{'x'.join(map(str, s.concrete(sizes)))}" for s in free)
        if text:
            ends[f"{prefix}_{end}_shapes"] = text
    return ends


def cache_for(
    bundle: Bundle, room: str, versions: Mapping[str, str | None], component: str = "", *, gpu: int = 0
) -> Path:
    """A folder that only this user can write, for this bundle, these versions and this GPU.

    ONNX Runtime names its engines after graph and GPU generation, and loads whatever lies there: an engine file of
    another TensorRT version, or of somebody else, must not be found in it.

    Args:
        room: the provider's folder in the cache.
        versions: of the libraries that the provider uses.
        component: where the provider would use the same names for two components.
        gpu: its index.
    """
    gpus = machine().gpus
    made_for = {
        "bundle": bundle.digest,
        **versions,
        "gpu": gpus[gpu].name if gpu < len(gpus) else None,
        "onnxruntime": version_of("onnxruntime-gpu") or version_of("onnxruntime"),
    }
    folder = cache_dir() / room / bundle.digest[:32] / digest_of(made_for)[:16] / component
    # One by one: with parents=True only the last one gets the mode.
    for place in (cache_dir() / room / bundle.digest[:32], folder.parent, folder):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not trust.private(folder):
        raise UserError(
            f"{folder} can be written by others, and what lies there is executed",
            f"chmod -R go-w {folder.parent.parent}",
        )
    return folder
