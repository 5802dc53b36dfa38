"""`accel.load`: any model, on any engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bundle import Bundle, is_bundle
from ..bundle.shape_profiles import profile as parse_profile
from ..engines import choose
from ..engines.select import facts
from ..errors import UserError
from ..pipeline import Pipeline, read_embeddings
from ..pipeline import load as load_opened
from ..pipeline import opened as opened_as_it_is
from .compiled import compiled, profile_around


def load(
    bundle: str | Path | Bundle,
    engine: str | Mapping[str, str] = "auto",
    *,
    export: Mapping[str, Any] | None = None,
    few_step: str | None = None,
    verify: bool = True,
    low_memory: bool = False,
    loras: Any = None,
    embeddings: Any = None,
    vae_tiling: bool | None = None,
    vae_tile: int | None = None,
    **options: Any,
) -> Pipeline:
    """Load a model as a pipeline that is called like diffusers': `load("my-bundle")("a cat", seed=0).images`.

    A bundle runs on any engine. A diffusers pipeline (a folder or a hub id) runs at once on eager torch, in float32
    unless `dtype` says otherwise; with an engine that runs graphs (`engine="onnxruntime"` or `"openvino"`) it is
    exported first, into accel's cache: minutes, once; later loads of the same files find it there.

    Args:
        bundle: a bundle or its folder, a diffusers pipeline folder, a hub id such as "org/model", or what ships:
            "digits", "digits/4step", ...
        engine: a name, "auto", or one per component such as {"unet": "openvino", "vae_decoder": "onnxruntime"}
            (components that are not named use "auto"). "auto" is the fastest that can run here, and never fails for
            speed: a note says what would be faster. `repr` of the pipeline shows what was chosen.
        export: options of `accel.export.export_pipeline` for a pipeline that is compiled on the way, such as
            {"precision": "int8"} or {"profile": "sd-512"}. By default float32, one to four images of half to twice
            the model's own size.
        few_step: the few-step family that a pipeline is of, or "none", where its names do not say it.
        verify: compare files with the manifest's digests first.
        low_memory: load each component when its phase begins and give its memory back when it ends. Every image
            then waits for the loading again; peak memory is that of the largest phase.
        loras: LoRA files to run with, as `Pipeline.set_loras` takes them; also with what is compiled on the way.
        embeddings: files of textual inversion, whose tokens prompts may use, as `Pipeline.set_embeddings` takes them.
        vae_tiling: decode (and encode) large images in overlapping tiles, as `Pipeline.enable_vae_tiling`; None
            for yes where the bundle was exported for tiles.
        vae_tile: side of a tile in pixels, which enables tiling too; None for diffusers' own, or the bundle's.
        options: the engine's own options (device, dtype, provider, threads, ...).

    Returns:
        A pipeline; `close()` it, or use it in a `with`, to give its memory back.

    Raises:
        UserError: when the model is damaged or incomplete, cannot be exported, or the engine cannot run here.
    """
    ready: str | Path | Bundle = bundle
    if not _is_bundle(bundle, export=export, few_step=few_step):
        ready = opened(bundle, engine, export=export, few_step=few_step)
    if _is_pipeline(ready) and _wants_graphs(engine):
        read_embeddings(ready, embeddings)  # says what does not fit before the minutes of an export
        ready = compiled(ready, {"profile": ready.manifest.profile.name, **(export or {})})
    changed = dict(loras=loras, embeddings=embeddings)
    tiling = dict(vae_tiling=vae_tiling, vae_tile=vae_tile)
    return load_opened(ready, engine, verify=verify, low_memory=low_memory, **changed, **tiling, **options)


def opened(
    model: str | Path | Bundle,
    engine: str | Mapping[str, str] = "auto",
    *,
    export: Mapping[str, Any] | None = None,
    few_step: str | None = None,
) -> Bundle:
    """A model before it is loaded: a pipeline that is to be compiled says what the compiled one will accept.

    Raises:
        UserError: for an engine that cannot run here, and options that change nothing.
    """
    bundle = opened_as_it_is(model, few_step=few_step)
    if _is_bundle(model, export=export, few_step=few_step) or not _is_pipeline(bundle):
        return bundle
    if not _wants_graphs(engine):
        if export:
            fix = "engine='onnxruntime' or 'openvino'; or leave export out"
            raise UserError(f"engine {engine} runs a pipeline as it is, so nothing is exported", fix)
        return bundle
    name = (export or {}).get("profile") or profile_around(bundle)
    native = bundle.manifest.pipeline["native_size"]
    return replace(bundle, manifest=replace(bundle.manifest, profile=parse_profile(name, native=native)))


def _is_bundle(model: Any, **of_a_pipeline: Any) -> bool:
    found = isinstance(model, (str, Path)) and is_bundle(model)
    for name, value in of_a_pipeline.items():
        if found and value:
            raise UserError(f"{model} is a bundle already: {name} would change nothing", f"leave {name} out")
    return found


def _is_pipeline(model: Any) -> Any:
    return isinstance(model, Bundle) and hasattr(model, "source")


def _wants_graphs(engine: Any) -> bool:
    """Whether an engine was named that runs graphs, and can run here."""
    named = engine.values() if isinstance(engine, Mapping) else [engine]
    graphs = [name for name in dict.fromkeys(named) if name != "auto" and facts(name).reads_graph]
    for name in graphs:
        choose(name)
    return bool(graphs)
