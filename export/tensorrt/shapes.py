"""Named profiles as TensorRT's optimisation profiles: the shapes of every input, smallest, best and largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accel.bundle import Bundle, Component
from accel.bundle.shape_profiles import Profile, Range
from accel.bundle.shape_profiles import profile as parse_profile
from accel.errors import UserError

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def profiles_of(bundle: Bundle, names: Sequence[str]) -> list[Profile]:
    """The bundle's own profile, or the named ones, which must lie within it."""
    if not names:
        return [bundle.manifest.profile]
    native = bundle.manifest.pipeline["native_size"]
    chosen = [parse_profile(name, native=native) for name in names]
    repeated = {p.name for p in chosen if [q.name for q in chosen].count(p.name) > 1}
    if repeated:
        raise UserError(f"profile {repeated.pop()!r} is given twice", "name each profile once")
    return chosen


def dims_of(bundle: Bundle, component: Component, profile: Profile) -> dict[str, Range]:
    """The ranges of a component's dimensions under a profile.

    Raises:
        UserError: when the profile asks for what the exported graph does not take.
    """
    manifest = bundle.manifest
    wanted = profile.dims(
        vae_scale=manifest.pipeline["vae_scale"],
        latent_multiple=manifest.pipeline["latent_multiple"],
        guidance=float(manifest.sampler["guidance"]) > 1,
    )
    dims = {}
    for name, limits in component.dims.items():
        asked = wanted.get(name, limits)
        if asked.min < limits.min or asked.max > limits.max:
            raise UserError(
                f"profile {profile.name!r} asks for {name.replace('_', ' ')} {asked}, and {component.name} was "
                f"exported for {limits}",
                f"a profile within {manifest.profile.name!r}, or export again with --profile {profile.name}",
            )
        dims[name] = asked
    return dims


def shapes_of(component: Component, dims: Mapping[str, Range]) -> Shapes:
    """Input name -> (min, opt, max) shapes of the inputs that have a free dimension in the graph."""
    ends = [{name: getattr(limits, end) for name, limits in dims.items()} for end in ("min", "opt", "max")]
    return {
        spec.name: tuple(spec.concrete(sizes) for sizes in ends)
        for spec in component.inputs
        if any(isinstance(d, str) and not component.dims[d].fixed for d in spec.shape)
    }


def described(profile: Profile, component: Component, dims: Mapping[str, Range]) -> dict[str, Any]:
    """What a record keeps of a profile: its name, dimension -> (min, opt, max), and the shapes of the inputs."""
    return {
        "name": profile.name,
        "dims": {name: [limits.min, limits.opt, limits.max] for name, limits in dims.items()},
        "shapes": {name: [list(s) for s in ends] for name, ends in shapes_of(component, dims).items()},
    }
