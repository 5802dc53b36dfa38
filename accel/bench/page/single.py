"""The page of one benchmark document."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ..results import verdict
from . import sections
from .shell import whole


def page(document: Mapping[str, Any], images: Mapping[str, np.ndarray] = MappingProxyType({})) -> str:
    """The page as text, with everything in it.

    Args:
        document: of schema accel-bench/1.
        images: uint8 [N, H, W, 3] by variant, `eager` being the reference.
    """
    parts = [
        sections.speed(document),
        sections.roofline(document),
        sections.split(document),
        sections.sameness(document, images),
        sections.int8_verdict(document),
        sections.memory(document),
        sections.files(document),
        sections.method(document),
        sections.figures(document),
    ]
    bundle = document["bundle"]
    above = f"accel bench · {bundle['family']} · {bundle['precision']}"
    return whole(bundle["name"], above, verdict.sentence(document), parts, document, sections.heroes(document))
