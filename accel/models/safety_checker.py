"""The safety checker of Stable Diffusion 1.x: CLIP's vision model, compared with the embeddings of concepts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from ..bundle.tensor_spec import TensorSpec
from ..errors import UserError
from ..files import read_json
from ..safety import preprocessing
from ..safety.checker import COMPONENT, CONCEPTS, INPUT, SPECIAL_CARE
from .networks import FLOAT, Network
from .source import Source

WITHOUT = "accel.load(MODEL, safety_checker=False) and accel run --no-safety-checker run it without"


class SafetyChecker(nn.Module):
    """clip_input [images, 3, S, S] -> special_care_scores [images, 3], concept_scores [images, 17].

    A score is the cosine of image and concept less the concept's threshold, before any rounding
    (`accel.safety.verdict`).
    """

    def __init__(self, model: nn.Module, outputs: Sequence[TensorSpec] = ()):
        super().__init__()
        self.model = model

    def forward(self, clip_input: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model = self.model
        image = functional.normalize(model.visual_projection(model.vision_model(clip_input)[1]))
        special_care = image @ functional.normalize(model.special_care_embeds).t() - model.special_care_embeds_weights
        concepts = image @ functional.normalize(model.concept_embeds).t() - model.concept_embeds_weights
        return special_care, concepts


def network(source: Source, name: str, inputs: object) -> Network:
    """The network of the source's own checker."""
    model = source.load(name)
    side = model.config.vision_config.image_size
    outputs = (
        TensorSpec(SPECIAL_CARE, FLOAT, ("images", len(model.special_care_embeds))),
        TensorSpec(CONCEPTS, FLOAT, ("images", len(model.concept_embeds))),
    )
    return Network(name, name, SafetyChecker(model), (TensorSpec(INPUT, FLOAT, ("images", 3, side, side)),), outputs)


def has_checker(source: Source) -> bool:
    """Whether diffusers' pipeline of this model has one: SDXL's never asks for it."""
    return source.has(COMPONENT) and source.family != "sdxl"


def check(source: Source) -> None:
    """Refuse a checker that cannot be run as diffusers runs it, before work is spent on it.

    Raises:
        UserError: for a source without one, one of another class, one without files or feature extractor, and
            preprocessing that is not supported or does not fit it.
    """
    if not has_checker(source):
        raise UserError(f"{source.name} has no safety checker", "leave --safety-checker out")
    try:
        source.network_class(COMPONENT)
        vision = source.config(COMPONENT).get("vision_config")
        side = vision.get("image_size", 224) if isinstance(vision, dict) else 224
        if not source.weight_files(COMPONENT):
            raise UserError(f"{source.folder(COMPONENT)} holds no weights", "get the folder again")
        if not source.has("feature_extractor"):
            raise UserError(f"{source.path} has a safety checker and no feature extractor", "get the folder again")
        path = source.path / preprocessing.FILE
        made = preprocessing.read(read_json(path, "the feature extractor's config"), str(path))
        preprocessing.check_size(made, side, str(path))
    except UserError as error:
        raise UserError(error.message, f"{error.fix}; {WITHOUT}") from None
