"""The safety checker of a bundle: its network on an engine, and what stands around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..bundle.tensor_spec import TensorSpec
from ..errors import UserError
from ..files import read_json
from ..images import to_pil, unit_range
from . import preprocessing, verdict

COMPONENT = "safety_checker"
INPUT, SPECIAL_CARE, CONCEPTS = "clip_input", "special_care_scores", "concept_scores"


@dataclass(frozen=True)
class SafetyChecker:
    """Which images diffusers' StableDiffusionSafetyChecker of the same model rejects.

    Attributes:
        preprocess: PIL images -> what the network takes.
    """

    preprocess: preprocessing.Preprocessing

    @classmethod
    def of(cls, bundle: Bundle) -> SafetyChecker:
        """The one whose network is a component of a bundle, or of a pipeline folder that was opened like one.

        Raises:
            UserError: for a network that is none of a safety checker, and preprocessing that cannot be done or does
                not fit it.
        """
        component = bundle.component(COMPONENT)
        side = _side(component.inputs, component.outputs)
        if side is None:
            raise UserError(
                f"{bundle.path}: the inputs and outputs of {COMPONENT} are not those of a safety checker",
                "export the model again",
            )
        place = f"{bundle.path}/{preprocessing.FILE}"
        made = preprocessing.read(read_json(bundle.file(preprocessing.FILE), "the feature extractor's config"), place)
        preprocessing.check_size(made, side, place)
        return cls(made)

    def __call__(self, engine: Callable[..., Mapping[str, Any]], pixels: np.ndarray) -> list[bool]:
        """Whether each image is rejected.

        Args:
            engine: the network; its outputs are numpy arrays or torch tensors.
            pixels: [images, 3, height, width] in about [-1, 1], as a VAE decoder leaves them.
        """
        out = engine(**{INPUT: self.preprocess(to_pil(unit_range(pixels)))})
        special_care, concepts = (np.asarray(_on_cpu(out[name])) for name in (SPECIAL_CARE, CONCEPTS))
        return verdict.rejected(special_care, concepts)


def _side(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> int | None:
    """Pixels along a side of what the network takes; None for a network of other tensors."""
    if [spec.name for spec in inputs] != [INPUT] or {spec.name for spec in outputs} != {SPECIAL_CARE, CONCEPTS}:
        return None
    shape = inputs[0].shape
    shaped = len(shape) == 4 and shape[1] == 3 and isinstance(shape[2], int) and shape[2] == shape[3]
    scores = all(len(spec.shape) == 2 and isinstance(spec.shape[1], int) for spec in outputs)
    single = all(spec.dtype == "float32" and spec.shape[0] == shape[0] for spec in (*inputs, *outputs))
    return int(shape[2]) if shaped and scores and single else None


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
