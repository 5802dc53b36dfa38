"""T2I-Adapter and ControlNet as thin torch modules, and the shapes of what they add to a UNet.

Both add tensors to the UNet at its inner resolutions. A shape is (channels, stride): how many latent pixels one of its
pixels covers along a side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..bundle.tensor_spec import TensorSpec
from ..errors import UserError

FLOAT = "float32"
Shape = tuple[int, int]


class T2IAdapter(nn.Module):
    """control_image [images, C, H, W] in [0, 1] -> adapter_features_0 ... [images, c, h, w], as many as are taken."""

    def __init__(self, model: nn.Module, outputs: Sequence[TensorSpec]):
        super().__init__()
        self.model = model
        self.count = len(outputs)

    def forward(self, control_image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.model(control_image)[: self.count])


class ControlNet(nn.Module):
    """sample, timestep, encoder_hidden_states, control_image [batch, 3, H, W] -> down_residual_0 ..., mid_residual."""

    def __init__(self, model: nn.Module, outputs: Sequence[TensorSpec] = ()):
        super().__init__()
        self.model = model
        pooled = getattr(model.config, "global_pool_conditions", False)
        self.strides = [stride for _, stride in residual_shapes(model.config)] if pooled else []

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        control_image: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        added = None
        if text_embeds is not None:
            added = {"text_embeds": text_embeds.to(time_ids.dtype), "time_ids": time_ids}
        residuals = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            controlnet_cond=control_image,
            added_cond_kwargs=added,
            return_dict=False,
        )
        outputs = (*residuals[0], residuals[1])
        if not self.strides:
            return outputs
        # One value for each channel of each image, which holds at every pixel.
        height, width = sample.shape[2:]
        each = zip(outputs, self.strides, strict=True)
        return tuple(out.expand(-1, -1, -(-height // stride), -(-width // stride)) for out, stride in each)


def unet_adapter_shapes(config: Any) -> list[Shape]:
    """Where a UNet takes the features of a T2I-Adapter: one after each down block, then one after the mid block.

    A block with attention takes them before its downsampler, a plain one after it (diffusers' UNet2DConditionModel).
    The mid block takes what is left over if it has its shape, which is so for SDXL.
    """
    shapes, last = [], len(config["block_out_channels"]) - 1
    for i, (channels, block) in enumerate(zip(config["block_out_channels"], config["down_block_types"], strict=True)):
        shapes.append((channels, 2**i if block.startswith("CrossAttn") or i == last else 2 ** (i + 1)))
    if config["mid_block_type"] is not None:
        shapes.append((config["block_out_channels"][last], 2**last))
    return shapes


def adapter_shapes(config: Any, vae_scale: int) -> list[Shape]:
    """Shapes of the features that a T2I-Adapter puts out."""
    strides = [config["downscale_factor"] * 2**i for i in range(len(config["channels"]))]
    if config["adapter_type"] == "full_adapter_xl":
        strides = [config["downscale_factor"] * factor for factor in (1, 1, 2, 2)]
    return [(channels, stride // vae_scale) for channels, stride in zip(config["channels"], strides, strict=True)]


def residual_shapes(config: Any) -> list[Shape]:
    """Shapes of the residuals of a ControlNet, one for each skip connection: conv_in, then every layer in order."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    per_block = layers if isinstance(layers, (list, tuple)) else [layers] * len(widths)
    shapes, last = [(widths[0], 1)], len(widths) - 1
    for i, (channels, count) in enumerate(zip(widths, per_block, strict=True)):
        shapes += [(channels, 2**i)] * count
        if i != last:
            shapes.append((channels, 2 ** (i + 1)))
    return [*shapes, (widths[last], 2**last)]


def feature_specs(shapes: Sequence[Shape], batch: str) -> list[TensorSpec]:
    return [_spec(f"adapter_features_{i}", shape, batch) for i, shape in enumerate(shapes)]


def residual_specs(shapes: Sequence[Shape], batch: str) -> list[TensorSpec]:
    names = [*(f"down_residual_{i}" for i in range(len(shapes) - 1)), "mid_residual"]
    return [_spec(name, shape, batch) for name, shape in zip(names, shapes, strict=True)]


def _spec(name: str, shape: Shape, batch: str) -> TensorSpec:
    channels, stride = shape
    suffix = "" if stride == 1 else f"_{stride}"
    return TensorSpec(name, FLOAT, (batch, channels, f"latent_height{suffix}", f"latent_width{suffix}"))


def match_adapter(adapter: Any, unet: Any, vae_scale: int) -> list[Shape]:
    """The features of an adapter that this UNet takes.

    Raises:
        UserError: for an adapter of another family, with both sides' shapes.
    """
    theirs, own = adapter_shapes(adapter, vae_scale), unet_adapter_shapes(unet)
    count = min(len(theirs), len(own))
    if theirs[:count] != own[:count] or count < len(unet["block_out_channels"]):
        raise UserError(
            f"this T2I-Adapter is for another family: it gives {_text(theirs)}, this UNet takes {_text(own)}",
            "give an adapter that was made for this family (SDXL's are of type full_adapter_xl)",
        )
    return own[:count]


def match_controlnet(controlnet: Mapping[str, Any], unet: Mapping[str, Any]) -> list[Shape]:
    """The residuals of a ControlNet, which must be those that this UNet takes.

    Raises:
        UserError: for a ControlNet of another family or topology.
    """
    channels = [config.get("in_channels", 4) for config in (controlnet, unet)]
    if channels[0] != channels[1]:
        raise UserError(
            f"this ControlNet takes {channels[0]} channels, the UNet {channels[1]}: a ControlNet beside a UNet for "
            "inpainting or editing is not supported",
            "leave the ControlNet out, or give a text-to-image model; --mask works with that too",
        )
    for key in ("cross_attention_dim", "addition_embed_type"):
        theirs, own = controlnet.get(key), unet.get(key)
        if theirs != own:
            raise UserError(
                f"this ControlNet is for another family: its {key} is {theirs}, the UNet's {own}",
                "give a ControlNet that was made for this family",
            )
    theirs, own = residual_shapes(controlnet), residual_shapes(unet)
    if theirs != own:
        raise UserError(
            f"this ControlNet is for another UNet: it gives {_text(theirs)}, this one takes {_text(own)}",
            "a pruned student has fewer skip connections than the model that the ControlNet was made for",
        )
    return own


def _text(shapes: Sequence[Shape]) -> str:
    return ", ".join(f"{channels} channels at 1/{stride}" for channels, stride in shapes)


def t2i_adapter(model: nn.Module, shapes: Sequence[Shape]) -> tuple[nn.Module, tuple, tuple]:
    """Module, inputs and outputs; `shapes` as `match_adapter` returns them."""
    inputs = (TensorSpec("control_image", FLOAT, ("images", model.config.in_channels, "height", "width")),)
    outputs = tuple(feature_specs(shapes, "images"))
    return T2IAdapter(model, outputs), inputs, outputs


def controlnet(model: nn.Module, unet_inputs: Sequence[TensorSpec]) -> tuple[nn.Module, tuple, tuple]:
    """Module, inputs and outputs; the inputs it shares with the UNet are the UNet's."""
    wanted = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")
    shared = [spec for spec in unet_inputs if spec.name in wanted]
    channels = model.config.conditioning_channels
    inputs = (*shared, TensorSpec("control_image", FLOAT, ("batch", channels, "height", "width")))
    return ControlNet(model), inputs, tuple(residual_specs(residual_shapes(model.config), "batch"))
