"""The network of an EDM model with named tensors, and what a manifest says beside it.

The graph is F of D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (Karras et al. 2022, arXiv 2206.00364, equation 7),
which is a plain network that any precision suits. The rest is a handful of multiplications, which a pipeline does
outside in float64: x is 40,000 times larger at the first step than at the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...bundle.kinds import DENOISER
from ...bundle.tensor_spec import TensorSpec
from ...errors import UserError
from ...sampling import Sampling
from ...sampling.edm.levels import RHO, SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, edm_sigmas
from ..networks import FLOAT, Network
from .source import EDMSource

TEACHER = {"name": "heun", "steps": 40, "guidance": 0.0}  # 79 calls, as EDM draws 64 px without churn


class Denoiser(nn.Module):
    """sample [images, C, h, w], c_noise [images][, class_labels int64 [images]] -> out_sample, of sample's shape."""

    def __init__(self, model: nn.Module, outputs: Sequence[TensorSpec] = ()):
        super().__init__()
        self.model = model

    def forward(
        self, sample: torch.Tensor, c_noise: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        return self.model(sample, c_noise, class_labels=class_labels, return_dict=False)


def denoiser(source: Any, name: str, inputs: Any = None) -> Network:
    """The network of a source, or of one whose networks have shapes and no weights."""
    model = source.load(DENOISER)
    config = model.config
    image = ("images", config.in_channels, "latent_height", "latent_width")
    specs = [TensorSpec("sample", FLOAT, image), TensorSpec("c_noise", FLOAT, ("images",))]
    if config.num_class_embeds is not None:
        specs.append(TensorSpec("class_labels", "int64", ("images",)))
    made = TensorSpec("out_sample", FLOAT, ("images", config.out_channels, *image[2:]))
    return Network(DENOISER, DENOISER, Denoiser(model), tuple(specs), (made,))


def constants(source: EDMSource) -> dict[str, Any]:
    """`Manifest.pipeline` of the model: an image is its own latent.

    Raises:
        UserError: for a network that is not one of images of this family.
    """
    unet, scheduler = source.config("unet"), source.config("scheduler")
    size, channels = unet.get("sample_size"), unet.get("in_channels", 3)
    if not isinstance(size, int) or channels != unet.get("out_channels", 3) or channels not in (1, 3):
        raise UserError(
            f"{source.path}: a network of {channels} channels in, {unet.get('out_channels')} out and size {size!r} "
            "draws no images",
            "give an EDM model of grey or RGB images",
        )
    given = {"sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX, "rho": RHO, "sigma_data": SIGMA_DATA}
    return {
        "vae_scale": 1,
        "latent_channels": channels,
        "latent_multiple": 2 ** (len(unet["block_out_channels"]) - 1),
        "native_size": size,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "zero_empty_prompt": False,
        "classes": unet.get("num_class_embeds") or 0,
        **{name: float(scheduler.get(name, usual)) for name, usual in given.items()},
    }


def sampler(source: EDMSource, constants: dict[str, Any], name: str | None = None, steps: int | None = None) -> dict:
    """`Manifest.sampler` of the model: a student's own levels, or Heun's steps of a teacher.

    Args:
        name: heun or dmd2, where the folder does not say it: published weights of a student are like a teacher's.
        steps: of heun.

    Raises:
        UserError: for another sampler, or steps that a student was not trained for.
    """
    own = source.sampler() or {}
    name = name or own.get("name", "heun")
    if name == "heun":
        return {**TEACHER, "steps": TEACHER["steps"] if steps is None else checked_steps(steps)}
    if name != "dmd2":
        raise UserError(f"{name} does not sample an EDM model", "--sampler heun, or dmd2 for a few-step student")
    timesteps = own.get("timesteps", [999]) if own.get("name") == "dmd2" else [999]
    count = len(Sampling(sampler=name, guidance=0.0, timesteps=timesteps).timesteps or ())
    if steps not in (None, count):
        raise UserError(f"{source.name} is a student of {count} steps, not of {steps}", "leave --steps out")
    levels = edm_sigmas(rho=constants["rho"], sigma_min=constants["sigma_min"], sigma_max=constants["sigma_max"])
    if any(t != int(t) or t >= len(levels) for t in timesteps):
        raise UserError(f"{source.path}: timesteps {timesteps} are not whole numbers of 0 to 999", "get it again")
    return {
        "name": name,
        "timesteps": list(timesteps),
        "sigmas": [float(levels[int(t)]) for t in timesteps],
        "guidance": 0.0,
    }


def checked_steps(steps: Any) -> int:
    """A number of steps.

    Raises:
        UserError: for less than one.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 10_000:
        raise UserError(f"invalid steps: {steps!r} (expected an integer of 1 to 10,000)", "such as 40")
    return steps
