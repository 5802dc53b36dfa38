"""Quality of generated digits: prompt accuracy by a classifier, and Frechet distance to real digits.

Prompt accuracy: the share of images in which a classifier sees the digit of the prompt.

Frechet distance (Heusel et al. 2017, arXiv 1706.08500), between the normal distributions fitted to two sets of
features: |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)). Heusel takes the features from Inception-v3; here they are the
64 penultimate features of the digit classifier. The distance of two finite sets of the same source is not zero, so
every figure is given with its floor: 500 real training images against the 500 held-out images that evaluate a model,
50 of each digit on either side. A model that only repeats its training data gets the floor, not zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import nn

from accel.assets import DIGITS
from accel.errors import UserError

from ..sources import digits
from .metrics import frechet_distance


class Classifier(nn.Module):
    """Images [n, 3, 64, 64] in -1..1 to digit scores [n, 10]. Group norm: the same in training and afterwards."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features [n, 64]."""
        return self.body(images.mean(1, keepdim=True))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def classifier_loss(
    model: Classifier, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Cross entropy on slightly turned, sheared, scaled, moved and noisy copies: as if by more than 13 writers."""
    count = len(images)

    def around(centre: float, spread: float) -> torch.Tensor:
        return centre + spread * (torch.rand(count, generator=generator) * 2 - 1)

    angle, scale, shear = around(0, math.radians(12)), around(1, 0.12), around(0, 0.15)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, shear - sin, around(0, 0.1), sin, cos, around(0, 0.1)], 1).view(count, 2, 3)
    # The ground is -1, grid_sample pads with 0: shift, sample, shift back.
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    noisy = moved + 0.1 * torch.randn(moved.shape, generator=generator)
    return F.cross_entropy(model(noisy), labels)


def save_classifier(model: Classifier, path: Path) -> None:
    """Half precision is enough for ten classes, and half the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(serialized({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}))


def load_classifier(path: Path = DIGITS / "classifier.safetensors") -> Classifier:
    """The classifier that ships with the package, or one of a training run.

    Raises:
        UserError: when the file is missing.
    """
    if not path.is_file():
        raise UserError(f"no digit classifier at {path}", "train one: python -m accel.distill.digits.train")
    model = Classifier().eval().requires_grad_(False)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model


@torch.no_grad()
def _in_batches(function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    return torch.cat([function(part) for part in images.split(250)])


def features(classifier: Classifier, images: torch.Tensor) -> np.ndarray:
    """Penultimate features [n, 64] of images [n, 3, 64, 64] in -1..1, in double precision."""
    return _in_batches(classifier.features, images).double().numpy()


def prompt_accuracy(images: torch.Tensor, wanted: torch.Tensor, classifier: Classifier | None = None) -> float:
    """Share of images [n, 3, 64, 64] in -1..1 in which the classifier sees the digit wanted [n]."""
    seen = _in_batches(classifier or load_classifier(), images).argmax(1)
    return (seen == wanted).double().mean().item()


def real_features(classifier: Classifier, part: str, per_digit: int | None = None) -> np.ndarray:
    """Features of the first `per_digit` real images of every digit of "train" or "held-out"; of all for None."""
    images, labels = digits.dataset(part)
    rows = torch.cat([torch.nonzero(labels == digit)[:per_digit, 0] for digit in range(10)])
    return features(classifier, images[rows])


def frechet_floor(classifier: Classifier, per_digit: int = digits.HELD_OUT_PER_DIGIT) -> float:
    """Distance of real images to real images: `per_digit` training images of each digit against the held-out ones."""
    return frechet_distance(real_features(classifier, "train", per_digit), real_features(classifier, "held-out"))


def generate(
    pipeline: Any,
    texts: list[str],
    guidance: float,
    steps: int = 25,
    seed: int = 0,
    batch: int = 50,
    timesteps: Sequence[int] | None = None,
) -> torch.Tensor:
    """Images [len(texts), 3, 64, 64] in -1..1 by any diffusers pipeline, in `steps` or at given `timesteps`.

    Image i starts from noise of seed `seed + i`, so it does not depend on the batch it is made in.
    """
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(part))]
        result = pipeline(
            part,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
            height=digits.SIZE,
            width=digits.SIZE,
            **(dict(timesteps=list(timesteps)) if timesteps else dict(num_inference_steps=steps)),
        )
        made.append(result.images.float().cpu() * 2 - 1)
    return torch.cat(made)


def evaluate(images: torch.Tensor, wanted: torch.Tensor, classifier: Classifier | None = None) -> dict[str, float]:
    """Prompt accuracy of generated images, and their Frechet distance to the 500 held-out real ones."""
    classifier = classifier or load_classifier()
    return dict(
        images=len(images),
        prompt_accuracy=prompt_accuracy(images, wanted, classifier),
        frechet_distance=frechet_distance(features(classifier, images), real_features(classifier, "held-out")),
    )
