"""What cannot be in one graph, said before anything is written."""

from __future__ import annotations

from accel.bundle import Bundle
from accel.bundle.kinds import control_components
from accel.errors import UserError


def check(bundle: Bundle) -> None:
    """Refuse a bundle with more inputs than a prompt and a seed.

    Raises:
        UserError: naming the part and what to do without it.
    """
    manifest = bundle.manifest
    name, parts = manifest.source["name"], manifest.components
    if missing := [part for part in ("unet", "vae_decoder") if part not in parts or not parts[part].graph]:
        raise UserError(f"{name} has no graph of its {missing[0]}", "export it as a whole: leave --components out")
    for part in control_components():
        if part in parts:
            raise UserError(
                f"{name} has a {part}, which is shown an image", "export it without --adapter, --controlnet"
            )
    if rounded := next((part for part in parts.values() if part.format == "fp8"), None):
        fix = "export it in another precision: --precision int8, or int8-weight-only"
        why = "ONNX Runtime moves what is fp8 through operators that do not take it"
        raise UserError(f"{rounded.name} of {name} is fp8, and no engine draws with such a graph as it is: {why}", fix)
    inputs = {spec.name: spec for spec in parts["unet"].inputs}
    if "image_embeds" in inputs:
        raise UserError(f"{name} has an IP-Adapter, which is shown an image", "export it without --ip-adapter")
    if manifest.edits or manifest.refines or inputs["sample"].shape[1] != manifest.pipeline["latent_channels"]:
        raise UserError(
            f"{name} starts from an image: one graph goes from a prompt to one", "use a text-to-image model"
        )
    known = {"sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond"}
    if strange := set(inputs) - known:
        raise UserError(f"the UNet of {name} takes {', '.join(sorted(strange))} too", "export it without that part")
    context, own = inputs["encoder_hidden_states"].shape[1], manifest.profile.tokens
    if own != 77 and context != 77:
        raise UserError(f"a context of {own} tokens is several of the encoder's", "export it with tokens=77")
    if manifest.profile.vae_tile:
        raise UserError("the VAE of this bundle takes tiles alone", "export it without vae_tile=")
