"""The folder of an EDM model, read like a bundle that has no graphs: the eager engines run it, nothing is written."""

from __future__ import annotations

from pathlib import Path

from ...bundle import Manifest
from ...bundle.kinds import DENOISER
from ...bundle.shape_profiles import Profile, Range, fixed
from ..pipeline_bundle import PipelineBundle, component_of, shapes_of
from ..source_networks import UNetInputs
from .network import constants, sampler
from .source import open_edm

_IMAGES = 64  # at most in one call of the network


def open_bundle(model: str | Path) -> PipelineBundle:
    """Open a folder; no weights are loaded yet.

    Raises:
        UserError: for a folder that is no EDM model.
    """
    source = open_edm(model)
    values, inputs = constants(source), UNetInputs()
    profile = Profile("any", Range(1, 1, _IMAGES), fixed(values["native_size"]), fixed(values["native_size"]))
    dims = profile.dims(vae_scale=1, latent_multiple=values["latent_multiple"], guidance=False, component=DENOISER)
    manifest = Manifest(
        family=source.family,
        topology=source.topology,
        pipeline=values,
        sampler=sampler(source, values),
        profile=profile,
        precision="fp32",
        source={"name": source.name},
        exporter={},
        components={DENOISER: component_of(shapes_of(source), DENOISER, inputs, dims)},
    )
    return PipelineBundle(path=source.path, manifest=manifest, source=source, inputs=inputs)
