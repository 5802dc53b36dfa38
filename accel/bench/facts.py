"""From what a run collected to its document: statistics, rates, files, environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from .. import __version__
from ..bundle import Bundle
from ..engines import status
from ..int8 import summary
from ..machine import machine
from ..pipeline import component_names
from . import quality, timing
from .document import MEASURED, PARTLY, UNMEASURED, Document, Floor, Row, Scope
from .probe import Process
from .state import State
from .variants import Variant, unable
from .work import IMAGE, describe

_PEAK_SECONDS = 1.0


def environment(state: State) -> dict[str, Any]:
    """The machine, its load before anything ran, and its measured rates (FLOP/s by dtype, and the memory's bytes/s)."""
    load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    here = machine()
    out: dict[str, Any] = {
        "machine": here.as_dict(),
        "load_average": load,
        "torch_threads": None,
        "device": None,
        "peak_flop_per_s": {},
        "bandwidth_bytes_per_s": None,
    }
    if load and load[0] > 0.3 * here.threads:
        state.notes.append(
            f"the machine was busy when this started (load average {load[0]} on {here.threads} threads): "
            "times are too long, and ratios less certain than their intervals say"
        )
    if not status("eager").ok:
        state.notes.append("FLOPs and the roofline are not measured: they need torch")
        return out
    import torch

    from .roofline import measure_bandwidth, measure_peak

    device = "cuda" if torch.cuda.is_available() else "cpu"
    stored = state.bundle.component("unet").dtype
    dtypes = sorted({variant.compute(stored) for variant in state.variants if not unable(variant, state.bundle)})
    if any(component.int8 and component.format == "int8" for component in state.bundle.manifest.components.values()):
        dtypes.append("int8")
    rates = {dtype: measure_peak(dtype, device, seconds=_PEAK_SECONDS) for dtype in dtypes}
    out |= {"bandwidth_bytes_per_s": measure_bandwidth(device, seconds=_PEAK_SECONDS)}
    return out | {"torch_threads": torch.get_num_threads(), "device": device, "peak_flop_per_s": rates}


def count(state: State) -> None:
    """FLOPs of one call of each component and of the whole image; left empty where torch is missing."""
    if not status("eager").ok or not state.recordings:
        return
    import torch

    from ..models.networks import on_meta
    from ..models.pipeline_bundle import PipelineBundle
    from .roofline import count_flops

    whole: dict[str, int] = {}
    for name, recording in state.recordings.items():
        record = state.bundle.component(name)
        if isinstance(state.bundle, PipelineBundle):
            module = state.bundle.module(name)
        else:
            config = state.bundle.file(f"{record.folder}/config.json")
            module = on_meta(record.kind, config, record.inputs, record.outputs)
        counted = []
        for feeds in recording.feeds:
            inputs = {
                spec.name: torch.as_tensor(feeds[spec.name]).to(torch.float32 if "float" in spec.dtype else torch.int64)
                for spec in record.inputs
            }
            counted.append(count_flops(module, inputs).as_dict())
        state.flops[name] = counted[0]
        for key in counted[0]:
            each = zip(counted, recording.counts, strict=True)
            whole[key] = whole.get(key, 0) + sum(flops[key] * calls for flops, calls in each)
    state.flops[IMAGE] = whole


def document(state: State, command: str) -> Document:
    """The document of a finished or interrupted run."""
    return Document(
        created=datetime.fromtimestamp(state.started, timezone.utc).isoformat(timespec="seconds"),
        accel=__version__,
        command=command,
        interrupted=state.interrupted,
        bundle=_bundle(state.bundle, state.flops),
        work=_work(state),
        environment=state.environment,
        rows=tuple(_row(state, variant) for variant in state.variants),
        noise_floor=_noise_floor(state),
        notes=tuple(state.notes + _standing_notes(state)),
    )


def _standing_notes(state: State) -> list[str]:
    notes = [
        "variants take turns within every round; speed-ups are ratios of medians with a bootstrap 95 % interval over "
        "paired rounds; a call shorter than 50 ms follows an untimed one",
        "parity is against eager fp32 on the same weights, prompts and noise; images in units of 1/255",
    ]
    for name in component_names(state.bundle):
        record = state.bundle.component(name)
        if record.int8:
            notes.append(
                f"{name} is {record.format}, and eager rounds as it does; what the export measured against float32: "
                + "; ".join(summary.lines(record))
            )
    if state.settings.memory:
        notes.append(
            "load, first image and memory come from a process that runs one variant alone, with the files in the page "
            "cache and empty engine caches; memory-mapped weights count as resident"
        )
    if state.interrupted:
        notes.append(f"interrupted after {state.rounds_done} of {state.settings.rounds} rounds")
    if any(recording.counts and len(recording.feeds) > 1 for recording in state.recordings.values()):
        notes.append("components that an image calls with several shapes are timed on the first of them")
    return notes


def _bundle(bundle: Bundle, flops: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    manifest = bundle.manifest
    components = {}
    for name in component_names(bundle):
        record = manifest.components[name]
        components[name] = {
            "parameters": record.parameters,
            "dtype": record.dtype,
            "graph_bytes": manifest.files[record.graph]["bytes"] if record.graph else None,
            "weights_bytes": manifest.files[record.weights]["bytes"] if record.weights else None,
            "export_seconds": record.parity.get("export_seconds"),
            "flop": flops.get(name),
            "int8": summary.lines(record),
        }
    return {
        "name": str(bundle.origin) if bundle.origin else bundle.path.name,
        "digest": bundle.digest,
        "family": manifest.family,
        "topology": manifest.topology,
        "precision": manifest.precision,
        "profile": manifest.profile.as_dict(),
        "sampler": dict(manifest.sampler),
        "components": components,
        "image_flop": flops.get(IMAGE),
    }


def _work(state: State) -> dict[str, Any]:
    settings, own = state.settings, state.bundle.manifest.sampler
    call = settings.call()
    size = None if state.reference is None else state.reference.image.shape[1:3]
    unet = state.recordings.get("unet")
    guidance = own["guidance"] if settings.guidance is None else settings.guidance
    return {
        "prompts": call["prompt"],
        "seeds": [settings.seed + i for i in range(settings.batch)],
        "batch": settings.batch,
        "height": size[0] if size else settings.height,
        "width": size[1] if size else settings.width,
        "sampler": settings.sampler or own["name"],
        **({"sampler_options": dict(settings.options)} if settings.options else {}),
        "steps": sum(unet.counts) if unet else settings.steps,
        "guidance": guidance,
        "unet_batch": int(unet.feeds[0]["sample"].shape[0]) if unet else None,
        "scopes": describe([*state.recordings, IMAGE], state.recordings),
        "warmup": max(2, settings.warmup),
        "rounds": settings.rounds,
        "rounds_done": state.rounds_done,
        "seconds": settings.seconds,
    }


def _row(state: State, variant: Variant) -> Row:
    name = variant.name
    stored = state.bundle.component("unet").dtype
    scopes = {scope: _scope(state, variant, scope) for scope in (*component_names(state.bundle), IMAGE)}
    reason = state.reasons.get(name, "") or state.partly.get(name, "")
    samples = [len(state.samples.get(scope, {}).get(name, ())) for scope in scopes]
    if not any(samples):
        outcome = UNMEASURED
        reason = reason or ("interrupted before its first round" if state.interrupted else "no samples")
    else:
        complete = not reason and not (state.interrupted and min(samples) < state.settings.rounds)
        outcome = MEASURED if complete else PARTLY
    skipped = "--no-memory" if not state.settings.memory else reason or "interrupted"
    sample = state.samples_of.get(name)
    return Row(
        variant=name,
        engine=variant.engine,
        dtype=variant.compute(stored),
        asked=variant.requested,
        description=state.descriptions.get(name, ""),
        status=outcome,
        reason=reason,
        scopes=scopes,
        process=state.processes.get(name) or Process(reason=skipped),
        parity=quality.parity(sample, state.reference),
        image_sha256=sample.sha256 if sample else None,
    )


def _scope(state: State, variant: Variant, scope: str) -> Scope:
    by_name = state.samples.get(scope, {})
    ours = by_name.get(variant.name, [])
    clock = timing.summary(ours)
    first = state.first_calls.get(variant.name, {}).get(scope)
    baselines = [v.name for v in state.variants if v.engine in ("eager", "compile")]
    ratios = {name: timing.speedup(by_name.get(name, []), ours) for name in ("eager", "compile", *baselines)}
    if clock is None:
        return Scope(first_call_s=first, speedup=ratios)
    component = state.bundle.component("unet" if scope == IMAGE else scope)
    flops = state.flops.get(scope, {}).get("total")
    rate = flops / clock.p50_s if flops else None
    # The peak was measured on one device; a variant on another has no business with it.
    here = state.environment.get("device") == state.devices.get(variant.name)
    peak = state.environment.get("peak_flop_per_s", {}).get(variant.compute(component.dtype)) if here else None
    return Scope(
        timing=clock,
        first_call_s=first,
        busy_s=state.busy_seconds.get(scope, {}).get(variant.name),
        images_per_s=state.settings.batch / clock.p50_s if scope == IMAGE else None,
        flop_per_s=rate,
        peak_fraction=rate / peak if rate and peak else None,
        speedup=ratios,
    )


def _noise_floor(state: State) -> tuple[Floor, ...]:
    nothing: dict[str, None] = {"unet": None, "image": None}
    if state.reference is None:
        return (Floor(what="eager, once more", parity=nothing, reason="no eager reference"),)
    rows = [Floor(what="eager, once more", parity=quality.parity(state.again, state.reference))]
    for name, sample in sorted(state.floors.items()):
        if isinstance(sample, quality.Sample):
            rows.append(Floor(what=name, parity=quality.parity(sample, state.reference)))
        else:
            rows.append(Floor(what=name, parity=nothing, reason=sample))
    return tuple(rows)
