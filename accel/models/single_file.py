"""Single-file checkpoints (one `.safetensors` or `.ckpt` for a whole pipeline) and loose weights of one network.

The names of the original Stable Diffusion code become diffusers' by diffusers' own conversion, offline. A single file
has neither tokenizers nor scheduler nor configs; those come from a base folder of the same family.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .config_files import network_class
from .topology import TOPOLOGIES
from .weight_files import SAFETENSORS, aliases, read, read_header

Tensors = Mapping[str, torch.Tensor]

UNET, VAE, TEXT, TEXT_XL = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders."
# Empty tensors by which a file says how it is sampled (`marks`).
MARKS = ("v_pred", "ztsnr")
# The hub repositories whose tokenizers and configs are fetched where no base folder is given.
BASES = {
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
ELSEWHERE = "optimum-onnx exports it: optimum-cli export onnx --model MODEL OUT"
_OTHERS = {
    "joint_blocks.": ("Stable Diffusion 3", ELSEWHERE),
    "double_blocks.": ("Flux", ELSEWHERE),
    "single_blocks.": ("Flux", ELSEWHERE),
    "clip_txt_mapper.": ("Stable Cascade", "run it with diffusers"),
    "conditioner.embedders.0.model.": ("SDXL's refiner", "export the base model; few-step students need no refiner"),
}


def family(state: Tensors, name: str) -> str:
    """sd1, sd2 or sdxl of a single file.

    Raises:
        UserError: for another kind of model, with the tool that does it; for a file without a UNet.
    """
    refuse_others(state, name)
    if not any(key.startswith(UNET) for key in state):
        raise UserError(f"{name} holds no Stable Diffusion pipeline", "give one with UNet, VAE and text encoder")
    if any(key.startswith(TEXT_XL) for key in state):
        return "sdxl"
    return "sd2" if any(key.startswith(f"{TEXT}model.") for key in state) else "sd1"


def marks(path: Path) -> dict[str, Any]:
    """What a file says of its own sampling, as scheduler fields: v-prediction and a zero terminal SNR.

    Trainers mark such models with empty tensors `v_pred` and `ztsnr`, or in the metadata (Stability's model spec).
    """
    if path.suffix == SAFETENSORS:
        header = dict(read_header(path)[1] or {})
        said = header.pop("__metadata__", None) or {}
    else:
        header, said = read(path), {}
    key = said.get("modelspec.prediction_type") or said.get("modelspec.predict_key")
    found: dict[str, Any] = {}
    if "v_pred" in header or key in ("v", "v_prediction"):
        found["prediction_type"] = "v_prediction"
    elif key in ("eps", "epsilon"):
        found["prediction_type"] = "epsilon"
    return found | ({"rescale_betas_zero_snr": True} if "ztsnr" in header else {})


def refuse_others(state: Tensors, name: str) -> None:
    for mark, (model, fix) in _OTHERS.items():
        if any(key.startswith(mark) or f".{mark}" in key[:60] for key in state):
            raise UserError(f"{name} is a {model} model, which is not supported", fix)


def converted(state: Tensors, component: str, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of one component of a single file, in diffusers' and transformers' names."""
    from diffusers.loaders import single_file_utils as theirs

    if component == "unet":
        return theirs.convert_ldm_unet_checkpoint(dict(state), config)
    if component == "vae":
        return theirs.convert_ldm_vae_checkpoint(dict(state), config)
    inner = SimpleNamespace(config=SimpleNamespace(**config))
    if component == "text_encoder_2":
        return theirs.convert_open_clip_checkpoint(inner, dict(state), prefix=f"{TEXT_XL}1.model.")
    if any(key.startswith(f"{TEXT}model.") for key in state):
        return theirs.convert_open_clip_checkpoint(inner, dict(state), prefix=f"{TEXT}model.")
    return theirs.convert_ldm_clip_checkpoint(dict(state))


def plain(state: Tensors, component: str, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Loose weights of one component: diffusers' names as they are, the original code's converted."""
    state = {key: value for key, value in state.items() if key not in MARKS}
    if any(key.startswith((UNET, VAE, TEXT, TEXT_XL)) for key in state):
        return converted(state, component, config)
    if component == "unet" and any(key.startswith("input_blocks.") for key in state):
        return converted({f"{UNET}{key}": value for key, value in state.items()}, component, config)
    if component == "vae" and any(key.startswith("decoder.mid.") for key in state):
        return converted({f"{VAE}{key}": value for key, value in state.items()}, component, config)
    return {key.removeprefix("module."): value for key, value in state.items()}


def unet_config(state: Tensors, base: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config of the UNet that a file holds: the base's own, else that of a known student of the same family.

    Raises:
        UserError: when neither fits, naming keys.
    """
    from diffusers import UNet2DConditionModel

    first = next(
        (
            state[key]
            for key in ("conv_in.weight", f"{UNET}input_blocks.0.0.weight", "input_blocks.0.0.weight")
            if key in state
        ),
        None,
    )
    channels = {} if first is None else {"in_channels": first.shape[1]}
    own = dict(base) | channels
    xl = base.get("addition_embed_type") == "text_time"
    others = [
        own | dict(entry.config) | channels | {"sample_size": base.get("sample_size")}
        for entry in TOPOLOGIES.values()
        if (entry.family == "sdxl") == xl
    ]
    first_misfit = ""
    for config in (own, *others):
        try:
            tensors = plain(state, "unet", config)
        except (KeyError, IndexError, AttributeError):
            continue
        with torch.device("meta"):
            wanted = UNet2DConditionModel.from_config(config).state_dict()
        problem = misfit(tensors, wanted)
        if not problem:
            return config
        first_misfit = first_misfit or problem
    raise UserError(
        f"{name} does not fit this pipeline's UNet: {first_misfit or 'its names are not those of a UNet'}",
        "give the UNet of the same family (or a base of the family it was made for)",
    )


def misfit(tensors: Tensors, wanted: Tensors) -> str:
    """What is missing, left over or of another shape; "" where everything fits."""
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    shapes = [key for key in wanted if key in tensors and tensors[key].shape != wanted[key].shape]
    parts = []
    if missing:
        parts.append(f"{len(missing)} weights are missing, first {missing[0]}")
    if extra:
        parts.append(f"{len(extra)} have no place, first {extra[0]}")
    if shapes:
        mine, theirs = list(tensors[shapes[0]].shape), list(wanted[shapes[0]].shape)
        parts.append(f"{len(shapes)} have another shape, first {shapes[0]} ({mine}, not {theirs})")
    return "; ".join(parts)


def build(
    library: str, class_name: str, config: Mapping[str, Any], state: Tensors, component: str, name: str
) -> nn.Module:
    """A network in float32 with the weights of a file.

    Raises:
        UserError: when they do not fit, naming keys.
    """
    from accelerate import init_empty_weights

    cls = network_class(component, library, class_name)
    config = dict(config)
    with init_empty_weights(include_buffers=False):
        model = cls(cls.config_class.from_dict(config)) if library == "transformers" else cls.from_config(config)
    tensors = plain(state, component, config)
    wanted = {key: value for key, value in model.state_dict().items() if not key.endswith("position_ids")}
    tensors = {
        next((alias for alias in aliases(key) if alias in wanted), key): value
        for key, value in tensors.items()
        if not key.endswith("position_ids")
    }
    if problem := misfit(tensors, wanted):
        raise UserError(
            f"{name} does not fit the {component}: {problem}", "give a base of the family that the file was made for"
        )
    full = {key: value.to(torch.float32) if value.is_floating_point() else value for key, value in tensors.items()}
    model.load_state_dict(full, strict=False, assign=True)
    return model.eval()
