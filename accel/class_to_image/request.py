"""What a call asks for, completed and checked against the bundle before any network runs."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from ..bundle import Manifest
from ..errors import UserError, unknown
from ..pipeline.request import seeds as seeds_of
from ..sampling.edm.levels import sampling_sigmas
from ..sampling.edm.solvers import IMAGENET64_CHURN, Churn

# name -> how often it calls the network in so many steps
SAMPLERS = {"heun": lambda steps: 2 * steps - 1, "dmd2": lambda steps: steps}
_STEPS, _MOST = 40, 10_000  # of a teacher whose bundle is a student's


@dataclass(frozen=True)
class Request:
    """A call.

    Attributes:
        labels: the class of each image; None of a model without classes.
        seeds: of each image.
        sampler: a key of `SAMPLERS`.
        sigmas: noise levels: of heun steps + 1, the last one 0; of dmd2 one for each call of the network.
        churn: fresh noise before heun's steps.
    """

    labels: list[int] | None
    seeds: list[int]
    sampler: str
    sigmas: list[float]
    churn: Churn | None = None

    @property
    def calls(self) -> int:
        """How often the network is called for a batch."""
        return SAMPLERS[self.sampler](len(self.sigmas) - (self.sampler == "heun"))


def complete(
    manifest: Manifest,
    class_labels: int | Sequence[int] | None,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    churn: float | Churn | None = None,
    images_per_class: int = 1,
    seed: int | Sequence[int] | None = None,
) -> Request:
    """The request of a call's arguments, as `ClassPipeline.__call__` describes them.

    Raises:
        UserError: for a class that the model does not have, and numbers that make no image.
    """
    if not _whole(images_per_class) or images_per_class < 1:
        raise UserError(f"invalid images_per_class: {images_per_class!r} (expected an integer >= 1)", "such as 1")
    labels = _labels(manifest, class_labels)
    count = len(labels or [0]) * images_per_class
    labels = None if labels is None else [label for label in labels for _ in range(images_per_class)]
    name, sigmas = _levels(manifest, sampler, steps)
    drawn = secrets.randbelow(2**31) if seed is None else seed
    return Request(labels, seeds_of(drawn, count), name, sigmas, _churn(churn, name))


def _labels(manifest: Manifest, given: Any) -> list[int] | None:
    classes, name = manifest.pipeline["classes"], manifest.source["name"]
    if not classes:
        if given is not None:
            raise UserError(f"{name} has no classes to choose from", "leave the class out")
        return None
    one = f"0 to {classes - 1}"
    if isinstance(given, str) or isinstance(given, (list, tuple)) and any(isinstance(label, str) for label in given):
        raise UserError(
            f"{name} draws one of {classes} classes, not what a text says", f"give a class: {one} (accel run --class 0)"
        )
    if given is None:
        raise UserError(f"no class is given, and {name} draws one of {classes}", f"--class N, {one}")
    labels = [given] if _whole(given) else list(given)
    if not labels:
        raise UserError("there is no class", f"give at least one of {one}")
    wrong = next((label for label in labels if not _whole(label) or not 0 <= label < classes), None)
    if wrong is not None:
        raise UserError(f"{wrong!r} is not one of the {classes} classes of {name}", f"--class N, {one}")
    return [int(label) for label in labels]


def _levels(manifest: Manifest, sampler: str | None, steps: int | None) -> tuple[str, list[float]]:
    own = manifest.sampler
    name = own["name"] if sampler is None else sampler
    if name not in SAMPLERS:
        raise unknown("sampler of a model of classes", name, SAMPLERS)
    values = manifest.pipeline
    if name == "dmd2":
        sigmas = own.get("sigmas", [values["sigma_max"]])
        if steps not in (None, len(sigmas)):
            raise UserError(
                f"{manifest.source['name']} draws in {len(sigmas)} step{'s' * (len(sigmas) > 1)}, not in {steps}",
                "leave steps out; or sampler heun, which follows the equation in any number of steps",
            )
        return name, list(sigmas)
    count = own.get("steps") or _STEPS if steps is None else steps
    if not _whole(count) or not 1 <= count <= _MOST:
        raise UserError(f"invalid steps: {count!r} (expected an integer of 1 to {_MOST})", "such as 40")
    return name, sampling_sigmas(int(count), values["rho"], values["sigma_min"], values["sigma_max"])


def _churn(given: float | Churn | None, sampler: str) -> Churn | None:
    if given is None or isinstance(given, Churn):
        made = given
    elif isinstance(given, Real) and not isinstance(given, bool) and 0 <= given and math.isfinite(given):
        made = replace(IMAGENET64_CHURN, amount=float(given)) if given else None
    else:
        raise UserError(f"invalid churn: {given!r} (expected a number >= 0)", "40 is EDM's for ImageNet in 256 steps")
    if made is not None and sampler != "heun":
        raise UserError(f"{sampler} draws fresh noise anyway, and has no churn", "leave churn out, or sampler heun")
    return made


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
