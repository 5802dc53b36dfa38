"""`accel.load`: any model, on any engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..assets import hub_id
from ..bundle import Bundle, Manifest, is_bundle
from ..bundle.shape_profiles import profile as parse_profile
from ..class_to_image import ClassPipeline
from ..class_to_image import load as load_by_class
from ..class_to_image import opened as opened_by_class
from ..engines import choose
from ..engines.select import facts
from ..errors import UserError
from ..pipeline import load as load_opened
from ..pipeline import opened as opened_as_it_is
from ..pipeline import read_embeddings
from ..safety import COMPONENT as SAFETY_CHECKER
from ..text.cache import SIZE
from .compiled import compiled, profile_around


def load(
    bundle: str | Path | Bundle,
    engine: str | Mapping[str, str] = "auto",
    *,
    export: Mapping[str, Any] | None = None,
    few_step: str | None = None,
    revision: str | None = None,
    verify: bool = True,
    low_memory: bool = False,
    offload: str | None = None,
    text_encoder_dtype: str | None = None,
    loras: Any = None,
    safety_checker: bool | None = True,
    embeddings: Any = None,
    vae_tiling: bool | None = None,
    vae_tile: int | None = None,
    text_cache: int = SIZE,
    **options: Any,
) -> Any:
    """Load a model as a pipeline that is called like diffusers': `load("my-bundle")("a cat", seed=0).images`.

    A model that draws images of classes, an EDM folder or a bundle of one, is called with a class: `load("edm")(7)`.

    A bundle runs on any engine. A diffusers pipeline (a folder or a hub id) runs at once on eager torch, in float32
    unless `dtype` says otherwise; with an engine that runs graphs (`engine="onnxruntime"` or `"openvino"`) it is
    exported first, into accel's cache: minutes, once; later loads of the same files find it there.

    Args:
        bundle: a bundle or its folder, a diffusers pipeline folder, the hub id of either, such as "org/model" or
            "org/model@v1.0", or what ships: "digits", "digits/4step", ... Of a bundle of the hub only those files are
            downloaded that the engine reads.
        engine: a name, "auto", or one per component such as {"unet": "openvino", "vae_decoder": "onnxruntime"}
            (components that are not named use "auto"). "auto" is the fastest that can run here, and never fails for
            speed: a note says what would be faster. `repr` of the pipeline shows what was chosen.
        export: options of `accel.export.export_pipeline` for a pipeline that is compiled on the way, such as
            {"precision": "int8"} or {"profile": "sd-512"}. By default float32, one to four images of half to twice
            the model's own size.
        few_step: the few-step family that a pipeline is of, or "none", where its names do not say it.
        revision: branch, tag or commit of a hub id; None for what it says itself, or main.
        verify: compare files with the manifest's digests first; those of the hub are compared in any case.
        low_memory: load each component when its phase begins and give its memory back when it ends. Every image
            then waits for the loading again; peak memory is that of the largest phase.
        offload: "model": the GPU holds one network at a time. On eager and compile its weights wait in host memory, as
            with diffusers' `enable_model_cpu_offload`; other engines are loaded when their phase begins and closed when
            it ends. "sequential": the GPU holds one layer at a time (`enable_sequential_cpu_offload`), on eager alone.
        text_encoder_dtype: dtype of the text encoders, such as "fp16", on engines that take `dtype`.
        loras: LoRA files to run with, as `Pipeline.set_loras` takes them; also with what is compiled on the way.
        safety_checker: False or None leaves out the safety checker, where the model has one: images that it would
            reject are not blackened. It always computes in float32.
        embeddings: files of textual inversion, whose tokens prompts may use, as `Pipeline.set_embeddings` takes them.
        vae_tiling: decode (and encode) large images in overlapping tiles, as `Pipeline.enable_vae_tiling`; None
            for yes where the bundle was exported for tiles.
        vae_tile: side of a tile in pixels, which enables tiling too; None for diffusers' own, or the bundle's.
        text_cache: of how many calls to keep what the text encoders made, so that the same prompts do not run them
            again; 0 for none.
        options: the engine's own options (device, dtype, provider, threads, ...).

    Returns:
        A `Pipeline`, or a `ClassPipeline`; `close()` it, or use it in a `with`, to give its memory back.

    Raises:
        UserError: when the model is damaged or incomplete, cannot be exported, or the engine cannot run here.
    """
    if revision is not None:
        bundle = _at(bundle, revision)
    memory: dict[str, Any] = dict(low_memory=low_memory, offload=offload)
    if (of_classes := opened_by_class(bundle)) is not None:
        texts = dict(few_step=few_step, text_encoder_dtype=text_encoder_dtype, loras=loras, embeddings=embeddings)
        texts |= dict(vae_tiling=vae_tiling, vae_tile=vae_tile)
        if strange := [name for name, value in texts.items() if value]:
            raise UserError(
                f"{strange[0]} is for images of texts, and {of_classes.name} draws images of classes",
                f"leave {strange[0]} out",
            )
        return _of_classes(of_classes, engine, export, verify=verify, **memory, **options)
    how = dict(export=export, few_step=few_step, safety_checker=safety_checker, embeddings=embeddings)
    ready = runnable(bundle, engine, **how)
    changed = dict(loras=loras, embeddings=embeddings, safety_checker=safety_checker)
    own = dict(vae_tiling=vae_tiling, vae_tile=vae_tile, text_cache=text_cache)
    memory |= dict(text_encoder_dtype=text_encoder_dtype)
    return load_opened(ready, engine, verify=verify, **memory, **changed, **own, **options)


def _of_classes(model: Bundle, engine: Any, export: Mapping[str, Any] | None, **how: Any) -> ClassPipeline:
    """A model that draws images of classes; its folder is compiled where the engine runs graphs."""
    if _is_pipeline(model) and _wants_graphs(engine):
        model = compiled(model, {"profile": "native", **(export or {})})
    elif export:
        fix = "leave export out; engine='onnxruntime' or 'openvino' compiles the folder of a model"
        raise UserError(f"{model.name} is run as it is, so nothing is exported", fix)
    return load_by_class(model, engine, **how)


def _at(model: Any, revision: str) -> str:
    """A hub id with the revision in it.

    Raises:
        UserError: where there are no revisions.
    """
    named = hub_id(model) if isinstance(model, (str, Path)) else None
    if named is None or named[1] not in (None, revision):
        raise UserError(f"revision {revision!r} is for a hub id, and {model} is none without one", "leave revision out")
    if hub_id(made := f"{named[0]}@{revision}") is None:
        raise UserError(f"{revision!r} cannot be a revision", "a branch, a tag or a commit")
    return made


def runnable(
    bundle: str | Path | Bundle,
    engine: str | Mapping[str, str] = "auto",
    *,
    export: Mapping[str, Any] | None = None,
    few_step: str | None = None,
    safety_checker: bool | None = True,
    embeddings: Any = None,
) -> str | Path | Bundle:
    """The model as the engine runs it, before it is loaded: a pipeline is compiled where the engine runs graphs.

    Raises:
        UserError: as `load`.
    """
    ready: str | Path | Bundle = bundle
    if not _is_bundle(bundle, export=export, few_step=few_step):
        ready = opened(bundle, engine, export=export, few_step=few_step, safety_checker=safety_checker)
    if _is_pipeline(ready) and _wants_graphs(engine):
        read_embeddings(ready, embeddings)  # says what does not fit before the minutes of an export
        checked = {SAFETY_CHECKER: True} if SAFETY_CHECKER in ready.manifest.components else {}
        ready = compiled(ready, {"profile": ready.manifest.profile.name, **checked, **(export or {})})
    return ready


def opened(
    model: str | Path | Bundle,
    engine: str | Mapping[str, str] = "auto",
    *,
    export: Mapping[str, Any] | None = None,
    few_step: str | None = None,
    safety_checker: bool | None = True,
) -> Bundle:
    """A model before it is loaded: a pipeline that is to be compiled says what the compiled one will accept.

    Raises:
        UserError: for an engine that cannot run here, and options that change nothing.
    """
    bundle = opened_as_it_is(model, few_step=few_step, safety_checker=safety_checker)
    if _is_bundle(model, export=export, few_step=few_step) or not _is_pipeline(bundle):
        return bundle
    if not _wants_graphs(engine):
        if export:
            fix = "engine='onnxruntime' or 'openvino'; or leave export out"
            raise UserError(f"engine {engine} runs a pipeline as it is, so nothing is exported", fix)
        return bundle
    name = (export or {}).get("profile") or profile_around(bundle)
    return replace(bundle, manifest=_within(bundle.manifest, name))


def _within(manifest: Manifest, name: str) -> Manifest:
    """The manifest of a pipeline, with the shapes of a profile instead of those that torch takes.

    Raises:
        UserError: for a profile that the networks cannot have.
    """
    constants = manifest.pipeline
    chosen = parse_profile(name, native=constants["native_size"])
    how = {key: constants[key] for key in ("vae_scale", "latent_multiple")}
    how |= dict(guidance=float(manifest.sampler["guidance"]) > 1, edits=manifest.edits)
    components = {}
    for part, component in manifest.components.items():
        wanted = chosen.dims(**how, component=part)
        components[part] = replace(component, dims={dim: wanted.get(dim, own) for dim, own in component.dims.items()})
    return replace(manifest, profile=chosen, components=components)


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
