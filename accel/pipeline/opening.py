"""A bundle, or a diffusers pipeline folder as it is, opened and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..assets import is_hub_id, resolve
from ..bundle import Bundle, is_bundle
from ..bundle.kinds import KINDS, kind_of
from ..bundle.replaced import steadily
from ..engines import choose, load_engine, offloading
from ..errors import Notice, UserError
from ..models.embeddings import files as embedding_files
from ..models.embeddings.for_bundle import Placed, placed
from ..models.lora import for_bundle
from ..models.lora.files import Spec
from ..safety import COMPONENT as SAFETY_CHECKER
from ..safety import SafetyChecker
from ..text.cache import SIZE
from . import arguments
from .lazy_engines import LazyEngines, component_names, present
from .pipeline import Pipeline, default_call, tokenizers_of


def opened(model: str | Path | Bundle, *, few_step: str | None = None, safety_checker: bool | None = True) -> Bundle:
    """A bundle by its folder; or a diffusers pipeline folder, read like a bundle that has no graphs.

    Args:
        model: either folder, a hub id, or the name of one that ships: `digits`, `digits/4step`, `digits/4step-int8`.
        few_step: the few-step family that a pipeline is of, or "none", where its names do not say it.
        safety_checker: whether the safety checker of a pipeline folder is opened with it.

    Raises:
        UserError: for anything else, and a bundle that draws images of classes.
    """
    arguments.check_switch("safety_checker", safety_checker)
    if isinstance(model, Bundle):
        model.refuse_by_class()
        return model
    if not isinstance(model, (str, Path)):
        expected = "the folder of a bundle or of a diffusers pipeline"
        raise UserError(
            f"invalid bundle: {arguments.short(model)} (expected {expected})", "such as accel.load('digits')"
        )
    if _is_pipeline(model):
        choose("eager")  # says what is missing where there is no torch
        from ..models.pipeline_bundle import open_pipeline

        return open_pipeline(model, few_step=few_step, safety_checker=bool(safety_checker))
    bundle = Bundle.open(model)
    bundle.refuse_by_class()
    return bundle


def _is_pipeline(model: str | Path) -> bool:
    """Whether a model is a diffusers pipeline: a folder that is no bundle, which are laid out like one, or a hub id."""
    return (is_hub_id(model) or (Path(resolve(model)) / "model_index.json").is_file()) and not is_bundle(model)


def load(
    bundle: str | Path | Bundle,
    engine: str | Mapping[str, str] = "auto",
    *,
    verify: bool = True,
    low_memory: bool = False,
    offload: str | None = None,
    text_encoder_dtype: str | None = None,
    loras: Spec | Sequence[Spec] | None = None,
    safety_checker: bool | None = True,
    embeddings: embedding_files.Spec | Sequence[embedding_files.Spec] | None = None,
    vae_tiling: bool | None = None,
    vae_tile: int | None = None,
    text_cache: int = SIZE,
    **options: Any,
) -> Pipeline:
    """Load a bundle, or a diffusers pipeline as it is; nothing is compiled. `accel.load` describes the arguments.

    Raises:
        UserError: when the bundle is damaged or incomplete, or the engine cannot run here.
    """
    if isinstance(bundle, (str, Path)) and not _is_pipeline(bundle):
        how = dict(verify=verify, low_memory=low_memory, offload=offload, loras=loras, embeddings=embeddings, **options)
        how |= dict(vae_tiling=vae_tiling, vae_tile=vae_tile, safety_checker=safety_checker)
        how |= dict(text_encoder_dtype=text_encoder_dtype, text_cache=text_cache)
        return steadily(bundle, lambda found: load(found, engine, **how))
    arguments.check_count("text_cache", text_cache)
    given, bundle = bundle, opened(bundle, safety_checker=safety_checker)
    if not isinstance(engine, (str, Mapping)):
        raise UserError(f"invalid engine: {arguments.short(engine)} (expected a name)", "such as engine='onnxruntime'")
    wanted = component_names(bundle) + (present(bundle, "afterwards") if safety_checker else [])
    if engine == "auto" and not bundle.component("unet").graph:
        name = given if isinstance(given, (str, Path)) else bundle.manifest.source["name"]
        warnings.warn(
            f"{name} is a diffusers pipeline, run by torch operator by operator; to compile it: "
            f"accel export {name} {Path(name).name}-bundle",
            Notice,
            stacklevel=3,
        )
    later = present(bundle, "on demand")
    by_component = engine if isinstance(engine, Mapping) else dict.fromkeys([*wanted, *later], engine)
    unknown = set(by_component) - set(bundle.manifest.components)
    if unknown and isinstance(engine, Mapping):
        raise UserError(f"{bundle.path} has no component {unknown.pop()!r}", f"it has: {', '.join(wanted)}")
    if verify:
        files = ("tokenizer", "tokenizer_2", "scheduler", "feature_extractor")
        bundle.verify(files)
        for name in wanted:
            chosen = by_component.get(name, "auto")
            if not (bundle.origin and (low_memory or chosen == "auto")):  # the engine fetches what it needs
                bundle.verify([bundle.component(name).folder], chosen)
    # These say what does not fit, before any engine is loaded.
    if SAFETY_CHECKER in wanted:
        SafetyChecker.of(bundle)
    learned = read_embeddings(bundle, embeddings)
    fused = for_bundle.fused(bundle, loras)
    if offload is not None:
        offloading.check(offload)
        if low_memory:
            raise UserError("low_memory drops the weights that offload keeps in host memory", "leave one of them out")
        options = options | {"offload": offload}
    exact = {name: value for name, value in options.items() if name != "dtype"}
    halves = {} if text_encoder_dtype is None else {"dtype": text_encoder_dtype}

    def options_of(name: str) -> dict[str, Any]:
        if kind_of(name).float32:
            return exact
        return options | halves if name in KINDS["text_encoder"].names else options

    loaders = {
        name: partial(load_engine, bundle, name, by_component.get(name, "auto"), verify=verify, **options_of(name))
        for name in [*wanted, *later]
    }
    engines = LazyEngines(
        loaders, offload=low_memory or offload is not None, weights=learned.tensors(bundle, fused.tensors)
    )
    if not engines.offload:
        for name in wanted:  # the others, such as the VAE encoder, wait for their first use
            engines[name]
    pipeline = Pipeline(bundle, engines, fused, learned, text_cache=text_cache)
    set_tiling(pipeline, vae_tiling, vae_tile)
    return pipeline


def read_embeddings(bundle: Bundle, embeddings: embedding_files.Spec | Sequence[embedding_files.Spec] | None) -> Placed:
    """Files of textual inversion and their places in a bundle's token tables, before anything is loaded.

    Raises:
        UserError: for a file that does not fit, or too many vectors.
    """
    return placed(bundle, embeddings, tokenizers_of(bundle, component_names(bundle)) if embeddings else {})


def set_tiling(pipeline: Pipeline, vae_tiling: bool | None, vae_tile: int | None) -> None:
    """Let the VAE of a pipeline see tiles or whole images, where either is asked for.

    Raises:
        UserError: for a side of tiles where there are to be none.
    """
    if vae_tiling or vae_tiling is None and vae_tile is not None:
        pipeline.enable_vae_tiling(vae_tile)
    elif vae_tile is not None:
        raise UserError(f"vae_tile = {vae_tile} without tiling", "leave vae_tile out, or vae_tiling=True")
    elif vae_tiling is False:
        pipeline.disable_vae_tiling()


def check_call(bundle: Bundle, *, vae_tiling: bool | None = None, vae_tile: int | None = None, **call: Any) -> None:
    """Refuse a call of `Pipeline` that this bundle cannot meet, before any engine is loaded.

    Args:
        vae_tiling, vae_tile: as of `load`.
        call: the arguments of the call.

    Raises:
        UserError: as the call itself would, but for what only an engine or an image file can tell.
    """
    unloaded = LazyEngines({name: partial(load_engine, bundle, name) for name in component_names(bundle)}, offload=True)
    given = arguments.read(default_call | call, default_call, {})
    pipeline = Pipeline(bundle, unloaded)
    set_tiling(pipeline, vae_tiling, vae_tile)
    pipeline.request(given)
