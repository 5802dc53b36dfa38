"""accel: distil, export, compile and measure Stable Diffusion. Three ways to use it:

Compile a model, and draw with it. A bundle is a folder that every engine reads; its pipeline is called like diffusers':

    from accel.export import export_pipeline

    export_pipeline("digits", "digits-bundle", profile="digits")  # or your own folder: accel export MODEL BUNDLE
    with accel.load("digits-bundle") as pipe:
        image = pipe("a handwritten seven", num_inference_steps=25, seed=7).images[0]

A pipeline folder or a hub id works too: as it is, or compiled on the way, once:

    accel.load("digits")("a handwritten seven")
    accel.load("digits", engine="onnxruntime")("a handwritten seven")

Embed its networks: in your own program, tensors in, tensors out; or in a diffusers pipeline that you have:

    unet = accel.load_engine("digits-bundle", "unet", engine="onnxruntime")
    out = unet(sample=latents, timestep=np.float32(500), encoder_hidden_states=text)["out_sample"]

    with accel.attach(diffusers_pipeline, "digits-bundle"):
        image = diffusers_pipeline("a handwritten seven").images[0]

Compare engines, and models:

    for engine in ("eager", "onnxruntime", "openvino"):  # `accel bench digits-bundle` measures them against each other
        print(accel.load("digits-bundle", engine)("a handwritten seven", seed=7))

What is wrong is a `UserError`: a sentence and its fix. What you should know is a `Notice`, a warning.
Importing this package loads neither torch nor diffusers; each name below is resolved on first use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _moved
from ._version import __version__
from .errors import Notice, UserError

if TYPE_CHECKING:
    from .attaching import attach as attach
    from .bundle import Bundle as Bundle
    from .engines import load_engine as load_engine
    from .loading import AccelPipeline as AccelPipeline
    from .loading import load as load
    from .patching import patch as patch
    from .pipeline import Output as Output
    from .pipeline import Pipeline as Pipeline
    from .publishing import push as push

_LAZY = {
    "load": "accel.loading",
    "AccelPipeline": "accel.loading",
    "load_engine": "accel.engines",
    "attach": "accel.attaching",
    "patch": "accel.patching",
    "push": "accel.publishing",
    "Bundle": "accel.bundle",
    "Pipeline": "accel.pipeline",
    "Output": "accel.pipeline",
}


def _lazy_names(package: str, table: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public names are imported when they are first used.

    Args:
        table: name -> the module that has it.
    """

    def get(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(table[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *table})


__getattr__, __dir__ = _lazy_names(__name__, _LAZY)

_moved.install()

__all__ = ["Notice", "UserError", "__version__", *_LAZY]
