"""The folder of an EDM model to a bundle of one component, its network; what stands around it are constants."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accel.bundle import Bundle, Manifest, finalize, is_bundle
from accel.bundle.kinds import DENOISER
from accel.bundle.shape_profiles import Profile
from accel.bundle.shape_profiles import profile as parse_profile
from accel.dtypes import QUANTIZED
from accel.errors import UserError
from accel.files import new_folder, refuse_existing, require_space
from accel.models.edm.folder import is_edm
from accel.models.edm.network import constants, denoiser
from accel.models.edm.network import sampler as sampling_of
from accel.models.edm.source import EDMSource, open_edm
from accel.models.source import Source

from .graph import component, trace

_STAGES = 4
_MOST = 63


def takes(model: Any) -> bool:
    """Whether a model is for `export`: the folder of an EDM model, one that is open, or a bundle of one."""
    if isinstance(model, EDMSource) or is_edm(model):
        return True
    return isinstance(model, (str, Path)) and is_bundle(model) and Bundle.open(model).manifest.by_class


def export(
    model: str | Path | Source,
    out: str | Path,
    texts: Sequence[str] = (),
    *,
    profile: str = "native",
    precision: str = "fp32",
    opset: int = trace.DEFAULT_OPSET,
    sampler: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[str, float], None] = lambda stage, fraction: None,
) -> Bundle:
    """Export an EDM model.

    Args:
        model: its folder.
        out: folder to write; it appears only when everything has succeeded.
        texts: names of options that were given and that only a pipeline of texts has.
        profile: the batches to accept, at the model's own size: native, static, or such as "batch=1-32".
        precision: fp32 or fp16.
        opset: ONNX opset.
        sampler: `name` (heun or dmd2) and `steps` to store instead of the folder's own.
        overwrite: replace a bundle that is already there.
        progress: called with a description and the fraction done.

    Raises:
        UserError: for what such a model does not have, and a graph that differs from torch by more than the limit.
    """
    if texts:
        name = texts[0]
        raise UserError(
            f"{name} is for pipelines of texts, and this model draws images of classes", f"leave {name} out"
        )
    if precision in QUANTIZED:
        raise UserError(
            f"{precision} is calibrated and accepted on images of prompts, which a model of classes has not",
            "--precision fp16, or fp32",
        )
    if not isinstance(model, Source) and not is_edm(model):
        raise UserError(f"{model} is a bundle already", f"accel run {model} --class 0")
    out = Path(out)
    refuse_existing(out, overwrite)
    source = open_edm(model.path if isinstance(model, Source) else model)
    values, chosen = constants(source), dict(sampler or {})
    _check_sampler(chosen)
    sampling = sampling_of(source, values, chosen.get("name"), chosen.get("steps"))
    shapes = _shapes(profile, values["native_size"])
    dims = shapes.dims(vae_scale=1, latent_multiple=values["latent_multiple"], guidance=False, component=DENOISER)
    stored = sum(path.stat().st_size for path in source.weight_files(DENOISER))
    require_space(out.absolute().parent, int(stored * (0.6 if precision == "fp16" else 1.2)))
    with new_folder(out, overwrite=overwrite) as folder:
        began = time.perf_counter()
        (folder / DENOISER).mkdir()

        def step(stage: str, done: int) -> None:
            progress(f"{DENOISER}: {stage}", done / _STAGES)

        step("loading", 0)
        network = denoiser(source, DENOISER)
        how: dict[str, Any] = dict(opset=opset, step=step, family=source.family, scaling_factor=1.0)
        record = component.exported(network, dims, precision, folder / DENOISER, **how)
        record = replace(record, parity={**record.parity, "export_seconds": round(time.perf_counter() - began, 2)})
        manifest = Manifest(
            family=source.family,
            topology=source.topology,
            pipeline=values,
            sampler=sampling,
            profile=shapes,
            precision=precision,
            source={"name": source.name, "weights_sha256": source.digest([DENOISER])},
            exporter={name: version(name) for name in ("torch", "onnx", "onnxscript", "diffusers", "transformers")}
            | {"opset": opset, "method": "torch.onnx.export(dynamo=True)"},
            components={DENOISER: record},
        )
        progress("digests", 0.99)
        finalize(folder, manifest)
    progress("done", 1.0)
    return Bundle.open(out)


def _check_sampler(chosen: Mapping[str, Any]) -> None:
    if (chosen.get("guidance") or 0) not in (0, 1):
        raise UserError("an EDM model has no guidance: no class stands for no class", "leave --guidance out")
    if strange := sorted(set(chosen) - {"name", "steps", "guidance"}):
        raise UserError(f"a sampler of an EDM model has no {strange[0]}", f"leave {strange[0]} out")


def _shapes(text: str, native: int) -> Profile:
    """The profile, whose size has to be the model's own: it was trained at no other."""
    shapes = parse_profile(text, native=native)
    for side in (shapes.height, shapes.width):
        if not (side.fixed and side.min == native):
            raise UserError(
                f"profile {text!r} is of {side} px, and this model draws {native} px alone",
                "--profile native, static, or batches such as batch=1-32",
            )
    if not shapes.batch.fixed and shapes.batch.max > _MOST:
        # diffusers' upsampling asks whether there are 64 images or more, so no one graph is for both.
        fix = f"--profile batch=1-{_MOST}; or one batch, such as batch=128"
        raise UserError(f"profile {text!r}: a range of batches ends at {_MOST} images at most", fix)
    if shapes.step or shapes.vae_tile:
        raise UserError(f"profile {text!r}: an EDM model has no VAE", "leave step and vae_tile out")
    return shapes
