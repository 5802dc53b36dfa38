"""The EDM family: a denoiser D(x; sigma) of images with a class, where noise is added and nothing is scaled down.

    x_sigma = x_0 + sigma eps
    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)              (Karras et al. 2022, arXiv 2206.00364, equation 7)

F is the ADM network (Dhariwal and Nichol 2021, arXiv 2105.05233) as a config of diffusers' `UNet2DModel`, so that what
is trained is saved, loaded and exported as diffusers does. DMD2 (arXiv 2405.14867) distils its ImageNet 64 x 64 form.

Shapes: x, D [b, c, h, w] in -1..1; sigma [b]; a label is a class index [b] or its one-hot row [b, classes].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from accel.errors import UserError
from accel.sampling.edm.levels import RHO, SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, edm_sigmas

from ..diffusion.losses import per_row

__all__ = ["RHO", "SIGMA_DATA", "SIGMA_MAX", "SIGMA_MIN", "Preconditioned", "edm_sigmas", "unet_config"]

# Of the full-size network: 295.9 M is what ADM and EDM publish. ADM's own network also predicts variances; the three
# output channels more make 295,904,454.
IMAGENET64_PARAMETERS = 295_899_267
_GROUPS = 32


def unet_config(
    *,
    size: int = 64,
    channels: int = 3,
    width: int = 192,
    multipliers: Sequence[int] = (1, 2, 3, 4),
    layers: int = 3,
    attention: Sequence[int] = (32, 16, 8),
    head_width: int = 64,
    classes: int | None = 1000,
) -> dict[str, Any]:
    """Config of a `UNet2DModel` with ADM's graph; the defaults are ADM's and EDM's ImageNet 64 x 64.

    Args:
        size, channels: of the images.
        width: channels of the first level; `multipliers`: of each level, in units of it.
        layers: residual blocks per level of the encoder; the decoder has one more.
        attention: image sizes at which each residual block is followed by attention; the middle always has it.
        head_width: channels per attention head.
        classes: number of labels, or None for a network without.

    Raises:
        UserError: when a level with attention does not divide into heads.
    """
    widths = [width * multiplier for multiplier in multipliers]
    attends = [size >> level in attention for level in range(len(widths))]
    for level, (wide, used) in enumerate(zip(widths, attends, strict=True)):
        if wide % head_width and (used or level == len(widths) - 1):
            raise UserError(
                f"level {level} has {wide} channels, which do not divide into heads of {head_width}",
                f"choose a width that {head_width} divides, or another head_width",
            )
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["AttnDownBlock2D" if used else "ResnetDownsampleBlock2D" for used in attends],
        "up_block_types": ["AttnUpBlock2D" if used else "ResnetUpsampleBlock2D" for used in reversed(attends)],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": head_width,
        # ADM has at least 4 channels per group; diffusers has one number of groups for all levels, so only widths of
        # 128 and more can be ADM's exactly.
        "norm_num_groups": min(_GROUPS, width // 4),
        "attn_norm_num_groups": min(_GROUPS, width // 4),
        "norm_eps": 1e-5,
        "num_class_embeds": classes,
    }


def class_index(labels: torch.Tensor, classes: int, *, known: bool = False) -> torch.Tensor:
    """Class indices, int64 [b], from indices or one-hot rows [b, classes].

    `known` labels were checked on the host: asking a GPU would wait for it.

    Raises:
        UserError: for other shapes, classes that are not there, and rows that mix classes, which no embedding holds.
    """
    if labels.dim() == 1 and not labels.is_floating_point() and labels.dtype != torch.bool:
        index = labels.long()
        bad = (index < 0) | (index >= classes)
    elif labels.dim() == 2 and labels.shape[1] == classes:
        index = labels.argmax(1)
        bad = (labels != nn.functional.one_hot(index, classes).to(labels.dtype)).any(1)
    else:
        raise UserError(
            f"labels of shape {list(labels.shape)} and type {labels.dtype} are not classes",
            f"give whole numbers [b], or one-hot rows [b, {classes}]",
        )
    # Asked before the look-up: an index beyond a table stops a GPU's whole process, with no word about labels.
    if not known and not torch.compiler.is_compiling() and not is_fake(bad) and bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise UserError(f"label {row} is not a class of 0 to {classes - 1}: {_short(labels[row])}", "check the labels")
    return index


def _short(label: torch.Tensor) -> str:
    return str(int(label)) if label.dim() == 0 else f"a row with {int((label != 0).sum())} entries that are not 0"


class Preconditioned(nn.Module):
    """D(x; sigma) around F, with the preconditioning of arXiv 2206.00364, table 1:

        c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)       c_in    = 1 / sqrt(sigma^2 + sigma_data^2)
        c_out  = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)   c_noise = log(sigma) / 4

    so that F's input and its target have unit variance at every sigma. F runs in its own dtype (or autocast's), the
    rest in float32; in float64 where x is.

    Args:
        unet: F, a `UNet2DModel` of `unet_config`. Wrappers of several processes belong around this module, not around
            `unet`: the bottleneck is read from its parts.
        sigma_data: standard deviation of the images.

    Attributes:
        known_labels: whoever calls it has checked its labels.
    """

    def __init__(self, unet: nn.Module, sigma_data: float = SIGMA_DATA):
        super().__init__()
        self.unet = unet
        self.sigma_data = sigma_data
        self.known_labels = False

    @property
    def core(self) -> nn.Module:
        return self.unet

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        labels: torch.Tensor | None = None,
        *,
        bottleneck: bool = False,
    ) -> torch.Tensor:
        """The denoised image, float32 [b, c, h, w]; or the encoder's last state, float32 [b, C, h', w'].

        Args:
            x: noisy images.
            sigma: their noise levels [b], above 0, or one for all.
            labels: classes; None for a network without.
            bottleneck: return what the encoder says, and run neither the middle nor the decoder.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1).expand(x.shape[0])
        c_skip, c_out, c_in, c_noise = coefficients(sigma, self.sigma_data)
        scaled, index = (per_row(c_in, x) * x).to(self.unet.dtype), self._classes(labels)
        if bottleneck:
            return self._encode(scaled, c_noise, index).to(x.dtype)
        said = self.unet(scaled, c_noise, class_labels=index, return_dict=False)[0]
        return per_row(c_skip, x) * x + per_row(c_out, x) * said.to(x.dtype)

    def _classes(self, labels: torch.Tensor | None) -> torch.Tensor | None:
        classes = self.unet.config.num_class_embeds
        if (labels is None) != (classes is None):
            raise UserError(
                "this network has no classes, but labels were given"
                if classes is None
                else f"this network draws one of {classes} classes, and no labels were given",
                "leave the labels out" if classes is None else "give a class index per image",
            )
        return None if labels is None else class_index(labels, classes, known=self.known_labels)

    def _encode(self, x: torch.Tensor, c_noise: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        unet = self.unet
        embedding = unet.time_embedding(unet.time_proj(c_noise).to(x.dtype))
        if index is not None:
            embedding = embedding + unet.class_embedding(index)
        state = unet.conv_in(x)
        for block in unet.down_blocks:
            state, _ = block(hidden_states=state, temb=embedding)
        return state


def bottleneck(
    net: nn.Module, x: torch.Tensor, sigma: torch.Tensor | float, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """What DMD2's discriminator sees: the encoder's last state, [b, 768, 8, 8] of ImageNet 64 x 64; float32.

    Args:
        net: a `Preconditioned`, or what a wrapper of several processes made of it.
    """
    return net(x, sigma, labels, bottleneck=True)


def coefficients(
    sigma: torch.Tensor, sigma_data: float = SIGMA_DATA
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """c_skip, c_out, c_in, c_noise, of sigma's shape and dtype (arXiv 2206.00364, table 1)."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data * total.rsqrt(), total.rsqrt(), sigma.log() / 4


def loss_weight(sigma: torch.Tensor, sigma_data: float = SIGMA_DATA) -> torch.Tensor:
    """Weight of a squared error of D, [b]: 1 / c_out^2 = sigma^-2 + sigma_data^-2, which makes it F's error.

    EDM trains with it, and DMD2 its fake score.
    """
    return sigma**-2 + sigma_data**-2


def add_noise(x0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_sigma = x_0 + sigma eps, each row at its own level; in the dtype of x0."""
    return x0 + per_row(sigma, x0) * eps
