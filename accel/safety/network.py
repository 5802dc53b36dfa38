"""The network of the safety checker: CLIP's vision model, compared with the embeddings of concepts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from ..bundle.tensor_spec import TensorSpec


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
