"""A diffusers pipeline, read like a bundle that has no graphs: the eager engines run it, nothing is written."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bundle import Bundle, Component, Manifest
from ..bundle.kinds import KINDS, kind_of
from ..bundle.shape_profiles import Profile, Range, native_sides, round_to
from ..errors import UserError
from ..files import digest_of
from ..safety import COMPONENT as SAFETY_CHECKER
from ..sampling.noise_schedule import NoiseSchedule
from .config_files import built
from .constants import edits, note_left_out, own_sampling, pipeline_constants
from .ip_adapter.into_source import completed
from .source import Source, open_source
from .source_networks import UNetInputs, check_checker, clip_skips, has_checker, network_of, own_tokens, unet_inputs

_IMAGES, _PIXELS = 8, 8192  # at most in one call of a network, and along one side


@dataclass(frozen=True, repr=False)
class PipelineBundle(Bundle):
    """A pipeline folder, opened.

    Attributes:
        source: where its networks are.
        inputs: what its UNet takes.
    """

    source: Source
    inputs: UNetInputs

    def module(self, component: str) -> nn.Module:
        """A network as a torch module with named tensors, float32, weights loaded."""
        return network_of(self.source, component, self.inputs).module.eval().requires_grad_(False)

    def on_meta(self, component: str) -> nn.Module:
        """A network as a torch module with named tensors, on the meta device: nothing is loaded."""
        return network_of(shapes_of(self.source), component, self.inputs).module.eval().requires_grad_(False)

    def file(self, entry: str) -> Path:
        """The path of a file of the folder, which has no manifest to list it, by its place in a bundle."""
        folder, _, name = entry.partition("/")
        if folder in self.manifest.components:
            return self.source.folder(kind_of(folder).part or folder) / name
        return self.path / entry

    def listed(self, folder: str) -> frozenset[str]:
        """Names of all files in one of its folders."""
        return frozenset(path.name for path in (self.path / folder).glob("*"))

    def noise_schedule(self) -> NoiseSchedule:
        """Of the scheduler that an export would write: with what few-step weights and marks ask for."""
        return NoiseSchedule.from_scheduler(self.source.scheduler_for(self.manifest.sampler))

    @property
    def digest(self) -> str:
        parts = sorted({kind_of(name).part or name for name in self.manifest.components})
        return digest_of([self.manifest.as_dict(), self.source.digest(parts)])


def open_pipeline(
    model: str | Path | Source, *, few_step: str | None = None, safety_checker: bool = True
) -> PipelineBundle:
    """Open a pipeline folder, a hub id, or one that ships (`digits`, `digits/NAME`); no weights are loaded yet.

    Args:
        few_step: see `accel.models.source.open_source`.
        safety_checker: whether the folder's safety checker, where it has one, is one of the components.

    Raises:
        UserError: for a folder that is not a pipeline, or whose networks do not fit each other.
    """
    how: dict[str, Any] = dict(few_step=few_step, safety_checker=safety_checker)
    source = model if isinstance(model, Source) else open_source(model, **how)
    if source.embeddings:
        fix = (
            "accel.load(MODEL, embeddings=[...]) runs with them, accel.export.export_pipeline writes them into a bundle"
        )
        raise UserError("a source with embeddings is for an export: its folder has none of their tokens", fix)
    source = replace(source, clip_skips=tuple(clip_skips(source)))
    constants, sampling = pipeline_constants(source), own_sampling(source)
    note_left_out(source, safety_checker=False)  # whoever switches it off knows
    if checked := safety_checker and has_checker(source):
        check_checker(source)
    step = constants["vae_scale"]  # torch takes any latents: the UNet is told which sizes to go back up to
    height, width = (
        Range(step, round_to(native, step), _PIXELS // step * step, step)
        for native in native_sides(constants["native_size"])
    )
    profile = Profile("any", Range(1, 1, _IMAGES), height, width, own_tokens(source), step)
    inputs = unet_inputs(source, profile.tokens)
    dims = profile.dims(
        vae_scale=constants["vae_scale"],
        latent_multiple=constants["latent_multiple"],
        guidance=sampling.guidance > 1,
        edits=edits(source),
    )
    shapes = shapes_of(source)
    names = [name for kind in KINDS.values() for name in kind.names if source.has(kind.part or name)]
    names = [name for name in names if name != SAFETY_CHECKER or checked]
    return PipelineBundle(
        path=source.path,
        manifest=Manifest(
            family=source.family,
            topology=source.topology,
            pipeline=constants,
            sampler=sampling.as_dict(),
            profile=profile,
            precision="fp32",
            source={"name": source.name},
            exporter={},
            components={name: component_of(shapes, name, inputs, dims) for name in names},
        ),
        source=source,
        inputs=inputs,
    )


def component_of(source: Source, name: str, inputs: UNetInputs, dims: dict[str, Range]) -> Component:
    """The record of a network that has no graph.

    Args:
        source: one whose networks have shapes and no weights (`shapes_of`).
    """
    network = network_of(source, name, inputs)
    used = {d for spec in (*network.inputs, *network.outputs) for d in spec.shape if isinstance(d, str)}
    return Component(
        name=name,
        kind=network.kind,
        graph="",
        weights="",
        inputs=network.inputs,
        outputs=network.outputs,
        dims={dim: dims[dim] for dim in sorted(used)},
        parameters=sum(parameter.numel() for parameter in network.module.parameters()),
    )


def shapes_of(source: Source) -> Source:
    """The source, whose networks have shapes and no weights."""
    return _Shapes(**{field.name: getattr(source, field.name) for field in fields(source)})


class _Shapes(Source):
    """The source, whose networks have shapes and no weights."""

    def load(self, component: str) -> Any:
        cls, config = self.network_class(component), self.config(component)
        path = self.folder(component) / "config.json"
        with torch.device("meta"):
            if hasattr(cls, "from_config"):
                model = built(path, cls.__name__, lambda: cls.from_config(config))
            else:
                model = built(path, cls.__name__, lambda: cls(cls.config_class.from_dict(config)))
        return completed(self, component, model).eval()
