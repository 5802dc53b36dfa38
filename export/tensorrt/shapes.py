"""Named shape profiles as TensorRT optimization profiles: the min, opt and max shape of every input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from accel.bundle import Bundle, Component
from accel.bundle.shape_profiles import Profile, Range
from accel.bundle.shape_profiles import profile as parse_profile
from accel.errors import UserError

ENDS = ("min", "opt", "max")


def profiles_of(bundle: Bundle, names: Sequence[str]) -> list[Profile]:
    """The bundle's own profile, or the named ones, in the bundle's own steps and with its tiles where they say nothing.

    Raises:
        UserError: for an unknown name, or one that is given twice.
    """
    if not names:
        return [bundle.manifest.profile]
    native, own = bundle.manifest.pipeline["native_size"], bundle.manifest.profile
    named = [parse_profile(name, native=native) for name in names]
    chosen = [replace(p, step=p.step or own.step, vae_tile=p.vae_tile or own.vae_tile) for p in named]
    repeated = {p.name for p in chosen if [q.name for q in chosen].count(p.name) > 1}
    if repeated:
        raise UserError(f"profile {repeated.pop()!r} is given twice", "name each profile once")
    return chosen


def described(bundle: Bundle, component: Component, profile: Profile) -> dict[str, Any]:
    """An optimization profile of a component, as an engine's record keeps it.

    Returns:
        `name`: the profile's; `dims`: dimension -> [min, opt, max]; `shapes`: input -> its [min, opt, max] shapes, for
        the inputs that have a free dimension in the graph.

    Raises:
        UserError: when the profile asks for shapes that the exported graph does not take.
    """
    manifest = bundle.manifest
    wanted = profile.dims(
        vae_scale=manifest.pipeline["vae_scale"],
        latent_multiple=manifest.pipeline["latent_multiple"],
        guidance=float(manifest.sampler["guidance"]) > 1,
        edits=manifest.edits,
        component=component.name,
    )
    dims = {name: wanted.get(name, limits) for name, limits in component.dims.items()}
    for name, limits in component.dims.items():
        if dims[name].min < limits.min or dims[name].max > limits.max:
            raise UserError(
                f"profile {profile.name!r} asks for {name.replace('_', ' ')} {dims[name]}, and {component.name} was "
                f"exported for {limits}",
                f"a profile within {manifest.profile.name!r}, or export again with --profile {profile.name}",
            )
    return {
        "name": profile.name,
        "dims": {name: [getattr(limits, end) for end in ENDS] for name, limits in dims.items()},
        "shapes": shapes_of(component, dims),
    }


def shapes_of(component: Component, dims: Mapping[str, Range]) -> dict[str, list[list[int]]]:
    """Input -> its [min, opt, max] shapes, for the inputs that have a free dimension in the graph."""
    sizes = [{name: getattr(limits, end) for name, limits in dims.items()} for end in ENDS]
    return {
        spec.name: [list(spec.concrete(size)) for size in sizes]
        for spec in component.inputs
        if any(isinstance(d, str) and not component.dims[d].fixed for d in spec.shape)
    }
