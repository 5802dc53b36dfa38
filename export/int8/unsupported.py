"""UNets that cannot be quantized: calibration draws from prompts alone, and these take images or masks as well."""

from __future__ import annotations

from accel.errors import UserError


def refuse_control() -> None:
    """Raise the UserError about a UNet with inputs for an adapter or a ControlNet."""
    raise UserError(
        "a UNet with a T2I-Adapter or ControlNet cannot be quantized: calibration has no control images, and ranges "
        "would be too narrow where they add to it",
        "--int8-components text_encoder,vae_decoder; or export without the adapter or ControlNet",
    )


def refuse_image_prompts() -> None:
    """Raise the UserError about a UNet with an IP-Adapter."""
    raise UserError(
        "a UNet with an IP-Adapter cannot be quantized: calibration draws from words alone, and ranges would be too "
        "narrow where a picture adds to it",
        "--int8-components text_encoder,vae_decoder; or export without the IP-Adapter",
    )


def refuse_refiner() -> None:
    """Raise the UserError about SDXL's refiner."""
    raise UserError("a refiner cannot be quantized: calibration draws from prompts, without images", "--precision fp16")


def refuse_inpainting(channels: int) -> None:
    """Raise a UserError for a UNet whose input has the nine channels of inpainting models, or the eight of those that
    edit images."""
    if channels in (8, 9):
        what = "an inpainting model" if channels == 9 else "a model that edits images"
        raise UserError(
            f"{what} cannot be quantized: calibration draws from prompts, without images and masks", "--precision fp16"
        )
