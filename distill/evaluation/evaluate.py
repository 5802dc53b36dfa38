"""Evaluate a model by a named protocol: generate its images, on several processes and resumable, and measure them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from accel.bundle import Bundle
from accel.engines import choose
from accel.errors import UserError
from accel.files import digest_of, sha256, write_json
from accel.machine import machine, version_of
from accel.sampling import Sampling
from accel.text.prompt_files import read_prompts

from . import generators, metrics
from .own_sets import OWN_SETS, OwnSet
from .protocols import Protocol, full_id, overridden, protocol, sampling_changes, sampling_record
from .work_share import IMAGES, Shard, claim, confirm, image_file, is_whole, save, wait_for_images

SCHEMA = 1
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ALONE = Shard()
Progress = Callable[[str, float], None]


def evaluate(
    model: str | Path,
    name: str,
    out: str | Path,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    limit: int | None = None,
    batch: int | None = None,
    reference: str | Path | None = None,
    captions: str | Path | None = None,
    engine: str = "auto",
    options: Mapping[str, Any] | None = None,
    shard: Shard = ALONE,
    patience: float = 600.0,
    progress: Progress = lambda stage, fraction: None,
) -> dict[str, Any] | None:
    """Make the images of a protocol and measure them.

    Args:
        model: a diffusers pipeline folder, a hub id, `digits`, `digits/NAME`, or a bundle.
        name: id of the protocol, a key of `protocols.PROTOCOLS`.
        out: folder for `run.json`, `pictures/` and the result. Images that exist are kept.
        sampler, steps, guidance: instead of the protocol's; recorded in the id of every metric.
        limit: evaluate only the first N images; recorded in the id of every metric.
        batch: images per call; it does not change the images (beyond rounding).
        reference: folder of real images, or for pytorch-fid and imagenet64 an .npz of their mean `mu` and covariance
            `sigma`; for emoji, the folder of the judge.
        captions: a file of captions, as `accel.text.prompt_files` reads it.
        engine, options: the engine of a bundle and its options; `dtype` overrides the protocol's.
        shard: which images this process generates. Rank 0 also waits for the others' and measures.
        patience: how many seconds rank 0 waits for the next image of another process.
        progress: called as (stage, fraction of the stage).

    Returns:
        The result, as it was written to `result.json` (or, with a limit, `result-N-images.json`); None for ranks
        other than 0, which only make images.

    Raises:
        UserError: for a request that cannot be met, before any work where that can be known.
    """
    out, options = Path(out), dict(options or {})
    chosen = protocol(name)
    count = _count(chosen, limit)
    if batch is not None and batch < 1:
        raise UserError(f"invalid batch: {batch} (expected an integer >= 1)", "--batch 1, or more")
    own = OWN_SETS[chosen.prompts](reference) if chosen.prompts in OWN_SETS else None
    prompts, wanted = _prompts(chosen, own, captions, count)
    real: list[Path] | metrics.Statistics = []
    if shard.rank == 0:
        metrics.require(chosen.metrics)
        real = [] if own else _reference(chosen, reference)
    progress("opening the model", 0.0)
    opened = generators.open_model(model)
    _check_kind(chosen, opened, guidance)
    if opened.kind == "bundle":
        # Now, so that the record says which one `auto` was.
        engine = choose(engine, opened.origin.component(opened.network))
    usual = opened.own if chosen.own_sampling and opened.own else chosen.sampling
    used = overridden(usual, sampler, steps, guidance)
    # Given on the command line, then the protocol's; a bundle computes in its own unless another is given.
    dtype = options.get("dtype") or (chosen.dtype if opened.kind == "pipeline" else None) or opened.dtype
    if opened.kind == "pipeline":
        options["dtype"] = dtype
    size = chosen.size
    changes = sampling_changes(usual, used)
    if dtype != (chosen.dtype or opened.dtype):
        changes["dtype"] = dtype
    if count != chosen.images:
        changes["images"] = count
    if isinstance(real, list) and real and len(real) != chosen.reference_images:
        changes["reference"] = len(real)
    settings = _settings(chosen, opened, used, dtype, size, engine, options, _digest_of_prompts(chosen, own, captions))
    claim(out, settings)

    started = time.perf_counter()
    churn = chosen.churn if used.sampler == "heun" else None
    load = partial(generators.load, opened, used, size, engine, options, shard.local_rank, churn)
    made, ran_on = _make(chosen, settings, load, shard, prompts, out, batch or chosen.batch, progress)
    making = time.perf_counter() - started
    if shard.rank:
        return None
    files = wait_for_images(
        out,
        count,
        chosen.format,
        shard.world,
        patience,
        lambda there: progress(f"images of all processes: {there} of {count}", there / count),
    )
    started = time.perf_counter()
    full = full_id(chosen.id, changes)
    figures = [figure | {"protocol": full} for figure in _figures(chosen, own, files, prompts, wanted, real, progress)]
    result = {
        "schema": SCHEMA,
        "protocol": full,
        "title": chosen.title,
        "figures": figures,
        "images": count,
        "sampling": sampling_record(used) | {"dtype": dtype, "size": size, "seed": chosen.seed},
        "model": {"name": opened.name, "kind": opened.kind, "digest": opened.digest},
        "engine": _engine(opened, engine),
        "ran_on": ran_on,
        "prompts_digest": digest_of(list(prompts)),
        "reference": own.real if own else _described(real, reference),
        "pictures": IMAGES,
        "seconds": {"pictures": round(making, 3), "metrics": round(time.perf_counter() - started, 3)},
        "pictures_made": made,
        "processes": shard.world,
        "versions": {package: version_of(package) for package in metrics.packages(chosen.metrics)},
        "machine": machine().as_dict(),
    }
    write_json(out / result_name(chosen, count), result)
    return result


def _check_kind(chosen: Protocol, opened: generators.Model, guidance: float | None) -> None:
    """Refuse a model that the protocol does not measure."""
    if not isinstance(opened.origin, Bundle) or not opened.origin.manifest.by_class:
        if chosen.prompts == "classes":
            fix = "give an EDM model or a bundle of one, or another --protocol"
            raise UserError(f"{chosen.id} measures models of classes, and {opened.name} draws what a text says", fix)
        return
    if chosen.prompts != "classes":
        raise UserError(
            f"{chosen.id} measures models of texts, and {opened.name} draws images of classes", "--protocol imagenet64"
        )
    values = opened.origin.manifest.pipeline
    own = f"{values['native_size']} px and {values['classes']} classes"
    if own != (wanted := f"{chosen.size} px and {chosen.classes} classes"):
        raise UserError(f"{chosen.id} is of {wanted}, and {opened.name} of {own}", "give a model of those")
    if guidance not in (None, 0, 1):
        raise UserError(f"{opened.name} has no guidance: no class stands for no class", "leave --guidance out")


def result_name(chosen: Protocol, count: int) -> str:
    """A smaller trial does not take the place of the whole result."""
    return "result.json" if count == chosen.images else f"result-{count}-images.json"


def _count(chosen: Protocol, limit: int | None) -> int:
    if limit is None:
        return chosen.images
    if not 2 <= limit <= chosen.images:
        raise UserError(
            f"invalid limit: {limit} (expected an integer >= 2 and <= {chosen.images})",
            f"{chosen.id} has {chosen.images} images",
        )
    return limit


def _settings(
    chosen: Protocol,
    opened: generators.Model,
    used: Sampling,
    dtype: str,
    size: int,
    engine: str,
    options: Mapping[str, Any],
    prompts_digest: str,
) -> dict[str, Any]:
    """All that decides what an image looks like, and nothing else: not how many there are, nor who makes them."""
    return {
        "schema": SCHEMA,
        "protocol": chosen.id,
        "model": opened.name,
        "model_digest": opened.digest,
        **sampling_record(used),
        "dtype": dtype,
        "size": size,
        "seed": chosen.seed,
        "format": chosen.format,
        "engine": _engine(opened, engine),
        "provider": options.get("provider"),
        "prompts_digest": prompts_digest,
    }


def _engine(opened: generators.Model, engine: str) -> str:
    return engine if opened.kind == "bundle" else "diffusers"


# ------------------------------------------------------------------------------------------------ prompts and reference


def _prompts(
    chosen: Protocol, own: OwnSet | None, captions: str | Path | None, count: int
) -> tuple[list[str], list[int]]:
    """The prompts, and the numbers of what they ask for where the protocol has its own."""
    if chosen.prompts == "classes":
        if captions is not None:
            raise UserError(f"{chosen.id} draws classes, and reads no captions", "leave --captions out")
        return [str(label) for label in _labels(chosen)[:count]], []
    if own:
        if captions is not None:
            raise UserError(f"{chosen.id} has prompts of its own", "leave --captions out")
        if len(own.pairs) < count:
            raise UserError(
                f"this judge has {len(own.pairs)} prompts, and {chosen.id} has {count} images",
                f"measure fewer: --images {len(own.pairs)}",
            )
        return [text for text, _ in own.pairs[:count]], [number for _, number in own.pairs[:count]]
    if captions is None:
        raise UserError(f"{chosen.id} needs {chosen.images} captions", f"--captions FILE: {chosen.captions_source}")
    found = read_prompts(Path(captions), refuse_blank=True)
    if len(found) < count:
        raise UserError(
            f"{captions} has {len(found)} captions, and {chosen.id} needs {count}",
            f"get all of them ({chosen.captions_source}), or measure fewer images: --images {len(found)}",
        )
    return found[:count], []


def _labels(chosen: Protocol) -> list[int]:
    """The class of every image, uniformly random by the protocol's seed."""
    return np.random.default_rng(chosen.seed).integers(chosen.classes, size=chosen.images).tolist()


def _digest_of_prompts(chosen: Protocol, own: OwnSet | None, captions: str | Path | None) -> str:
    """Of the file, not of the prompts used: images stay good when more of them are asked for."""
    if chosen.prompts == "classes":
        return digest_of(_labels(chosen))
    return digest_of(own.pairs) if own else sha256(Path(captions or ""))


def _reference(chosen: Protocol, reference: str | Path | None) -> list[Path] | metrics.Statistics:
    """The real images, or their statistics."""
    if reference is None:
        what = "FILE.npz" if _takes_statistics(chosen) else "FOLDER"
        raise UserError(f"{chosen.id} needs real images", f"--reference {what}: {chosen.reference_source}")
    path = Path(reference)
    if path.suffix == ".npz" and path.is_file():
        return _statistics(chosen, path)
    if not path.is_dir():
        raise UserError(f"no such folder: {path}", f"--reference FOLDER: {chosen.reference_source}")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if len(found) < 2:
        raise UserError(f"{path} holds {len(found)} images", f"--reference FOLDER: {chosen.reference_source}")
    return found


def _statistics(chosen: Protocol, path: Path) -> metrics.Statistics:
    """Mean `mu` [2048] and covariance `sigma` [2048, 2048] of real images' features, as pytorch-fid saves them."""
    if not _takes_statistics(chosen):
        raise UserError(f"{path}: {chosen.id} takes real images, not their statistics", "--reference FOLDER")
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = np.asarray(file["mu"], np.float64), np.asarray(file["sigma"], np.float64)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} holds no statistics: {error}", "make it with pytorch-fid's --save-stats") from None
    if mean.shape != (2048,) or covariance.shape != (2048, 2048):
        raise UserError(
            f"{path}: mu {mean.shape} and sigma {covariance.shape} are not of 2,048 features",
            "make it with pytorch-fid's --save-stats",
        )
    return mean, covariance


def _takes_statistics(chosen: Protocol) -> bool:
    """Whether every distance of the protocol is one to statistics that are published."""
    return all(metric.extractor in ("pytorch-fid", "edm") for metric in chosen.metrics if metric.kind == "frechet")


def _described(real: list[Path] | metrics.Statistics, reference: str | Path | None) -> dict[str, Any]:
    if isinstance(real, tuple):
        return {"kind": "statistics", "sha256": sha256(Path(reference))}
    return {"kind": "pictures", "images": len(real), "names_digest": digest_of([path.name for path in real])}


# ------------------------------------------------------------------------------------------------ images and figures


def _make(
    chosen: Protocol,
    settings: Mapping[str, Any],
    load: Callable[[], tuple[generators.Maker, str]],
    shard: Shard,
    prompts: Sequence[str],
    out: Path,
    batch: int,
    progress: Progress,
) -> tuple[int, str | None]:
    """Make the images of this shard that are not there; how many that were, and what ran the model, if it ran."""
    own = shard.indices(len(prompts))
    progress("looking for images that are there", 0.0)
    todo = [index for index in own if not is_whole(image_file(out, index, chosen.format), chosen.size)]
    if not todo:
        return 0, None
    progress("loading the model", 0.0)
    make, ran_on = load()
    for start in range(0, len(todo), batch):
        done = len(own) - len(todo) + start
        progress(f"images: {done} of {len(own)}", done / len(own))
        part = todo[start : start + batch]
        images = make([prompts[index] for index in part], [chosen.seed + index for index in part])
        confirm(out, settings)
        for index, image in zip(part, images, strict=True):
            save(image, image_file(out, index, chosen.format), chosen.format)
    progress(f"images: {len(own)} of {len(own)}", 1.0)
    return len(todo), ran_on


def _figures(
    chosen: Protocol,
    own: OwnSet | None,
    files: Sequence[Path],
    prompts: Sequence[str],
    wanted: Sequence[int],
    real: list[Path] | metrics.Statistics,
    progress: Progress,
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for metric in chosen.metrics:
        progress(f"measuring: {metric.name}", 0.0)
        if own:
            found += own.figures(files, wanted)
            continue
        device = generators.torch_device(None, 0)
        share = _stage(progress, f"measuring: {metric.name}")
        found.append({"name": metric.name} | metrics.measure(metric, files, prompts, real, device, share))
    for figure in found:
        if not math.isfinite(figure["value"]):
            raise UserError(f"{figure['name']} is {figure['value']}", "look at the images; use more of them")
    return found


def _stage(progress: Progress, stage: str) -> Callable[[float], None]:
    return lambda fraction: progress(stage, fraction)
