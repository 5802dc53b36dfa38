"""A model that draws images of classes, opened and loaded: a bundle, or an EDM folder as it is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..assets import is_hub_id, resolve
from ..bundle import MANIFEST, Bundle, is_bundle
from ..bundle.kinds import DENOISER
from ..bundle.replaced import steadily
from ..engines import choose, load_engine, offloading
from ..errors import UserError
from ..models.edm.folder import is_edm
from ..pipeline.lazy_engines import LazyEngines
from .pipeline import ClassPipeline


def opened(model: Any) -> Bundle | None:
    """A model that draws images of classes; None for any other, and for what is no model.

    Args:
        model: a bundle, its folder or hub id, or the folder of an EDM model, read like a bundle without graphs.

    Raises:
        UserError: for a bundle or a folder that is damaged.
    """
    if isinstance(model, (str, Path)) and is_edm(model):
        choose("eager")  # says what is missing where there is no torch
        from ..models.edm.bundle import open_bundle

        return open_bundle(model)
    if isinstance(model, (str, Path)):
        if not (is_bundle(model) if is_hub_id(model) else (Path(resolve(model)) / MANIFEST).is_file()):
            return None
        model = Bundle.open(model)
    return model if isinstance(model, Bundle) and model.manifest.by_class else None


def load(
    bundle: Bundle,
    engine: str | Mapping[str, str] = "auto",
    *,
    verify: bool = True,
    low_memory: bool = False,
    offload: str | None = None,
    **options: Any,
) -> ClassPipeline:
    """Load a model that `opened` found; nothing is compiled. `accel.load` describes the arguments.

    Raises:
        UserError: when the bundle is damaged, or the engine cannot run here.
    """
    if not hasattr(bundle, "source"):
        how = dict(verify=verify, low_memory=low_memory, offload=offload, **options)
        return steadily(bundle.name, lambda found: _load(found, engine, **how))
    return _load(bundle, engine, verify=False, low_memory=low_memory, offload=offload, **options)


def _load(
    bundle: Bundle, engine: Any, *, verify: bool, low_memory: bool, offload: str | None, **options: Any
) -> ClassPipeline:
    if isinstance(engine, Mapping):
        if strange := set(engine) - {DENOISER}:
            raise UserError(f"{bundle.name} has no component {strange.pop()!r}", f"it has: {DENOISER}")
        engine = engine.get(DENOISER, "auto")
    if not isinstance(engine, str):
        raise UserError(f"invalid engine: {engine!r:.60} (expected a name)", "such as engine='onnxruntime'")
    if offload is not None:
        offloading.check(offload)
        if low_memory:
            raise UserError("low_memory drops the weights that offload keeps in host memory", "leave one of them out")
        options |= {"offload": offload}
    if verify and not (bundle.origin and (low_memory or engine == "auto")):
        bundle.verify([bundle.component(DENOISER).folder], engine)
    loader = partial(load_engine, bundle, DENOISER, engine, verify=verify, **options)
    engines = LazyEngines({DENOISER: loader}, offload=low_memory or offload is not None)
    if not engines.offload:
        engines[DENOISER]
    return ClassPipeline(bundle, engines)
