"""Read a LoRA file as updates of layers. Needs neither torch nor diffusers, unless the file is a pickle."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...files import parse_json
from .. import weight_files
from . import names, updates
from .files import LoraFile
from .updates import Update

METADATA = "lora_adapter_metadata"
_OTHER_KINDS = {
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".glora_": "GLoRA",
    ".on_input": "IA3",
    "lora_embedding_": "LoRA of embeddings",
    "bundle_emb": "a bundle of a LoRA and textual inversions",
    "emb_params": "a textual inversion",
}
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
_SHOWN = 3  # how many keys an error names
_RANK = object()  # stands for an alpha that is the rank
_AGAIN = "get the file again"


def read(file: LoraFile) -> dict[str, dict[str, Update]]:
    """Component -> layer, as the file writes it -> update.

    Args:
        file: diffusers' format (with or without alpha in its metadata), kohya's, LyCORIS' or OneTrainer's.

    Raises:
        UserError: when the file cannot be read, or holds anything but such updates.
    """
    tensors = weight_files.arrays(file.path)
    metadata = weight_files.metadata(file.path)
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, value in tensors.items():
        _refuse_other_kinds(name, tensors, file.path)
        key = names.parsed(name)
        if key is None:
            raise UserError(f"{file.path} holds a tensor that is not a LoRA weight: {name}", "give a LoRA file")
        layer = found.setdefault(key.component, {}).setdefault(key.layer, {})
        if key.part in layer:
            raise UserError(f"{file.path} has two tensors for one place, {name} for one", _AGAIN)
        layer[key.part] = value
    made: dict[str, dict[str, Update]] = {}
    for component, layers in found.items():
        settings = _settings(metadata, component)
        for layer, parts in layers.items():
            if text := updates.problem(parts):
                raise UserError(f"{file.path} is incomplete: of {component}.{layer}, {text}", _AGAIN)
            made.setdefault(component, {})[layer] = _update(layer, parts, settings, file.path)
    return made


def _refuse_other_kinds(name: str, tensors: Mapping[str, Any], path: Path) -> None:
    if name.startswith("base_model."):
        # Its alpha lies in another file; without it the LoRA would be fused at a wrong strength.
        raise UserError(
            f"{path} is peft's own format: {name}", "save it with diffusers: pipeline.save_lora_weights(...)"
        )
    if name.startswith("transformer."):
        raise UserError(f"{path} is not for a UNet: {name}; {made_for(tensors)}", "give a LoRA of Stable Diffusion")
    for mark, kind in _OTHER_KINDS.items():
        if mark in name:
            raise UserError(
                f"{path} is not a LoRA, LoHa or LoKr but {kind}: {name}",
                "fuse it with the tool it was made with, and export the fused pipeline",
            )


def _update(layer: str, parts: Mapping[str, np.ndarray], settings: Mapping[str, Any], path: Path) -> Update:
    kind = updates.kind_of(parts)
    assert kind is not None  # `updates.problem` has seen to that
    if "alpha" in parts:
        alpha = float(parts["alpha"].reshape(-1)[0])
        if not math.isfinite(alpha):
            raise UserError(f"{path}: the alpha of {layer} is {alpha}, not a number", _AGAIN)
        return Update(kind, parts, alpha)
    return Update(kind, parts, alpha_of(settings, layer, path), bool(settings.get("use_rslora")))


def _settings(metadata: Mapping[str, str], component: str) -> dict[str, Any]:
    """peft's settings of a component, as diffusers keeps them in the header; empty where there are none."""
    try:
        kept = parse_json(metadata.get(METADATA, "{}"))
    except ValueError:
        return {}
    prefix = f"{component}."
    fields = kept.items() if isinstance(kept, dict) else ()
    return {key.removeprefix(prefix): value for key, value in fields if key.startswith(prefix)}


def alpha_of(settings: Mapping[str, Any], layer: str, path: Path) -> float | None:
    """The alpha of one layer by peft's settings; None where they say none, which stands for the rank."""
    alpha, patterns = settings.get("lora_alpha", _RANK), settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{path}: alpha_pattern is {patterns!r:.80}, not a table", _AGAIN)
    for pattern, value in patterns.items():
        # peft takes regular expressions; what files hold are names. An expression could take forever.
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise UserError(
                f"{path}: alpha_pattern names no module but an expression, {pattern!r:.80}",
                "fuse it with the tool it was made with, and export the fused pipeline",
            )
        if f".{layer}".endswith(f".{plain}"):
            alpha = value
            break
    if alpha is _RANK:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
        raise UserError(f"{path}: the alpha of {layer} is {alpha!r:.80}, not a number", _AGAIN)
    return float(alpha)


def check_components(files: Iterable[LoraFile], present: Sequence[str], unet_config: Mapping[str, Any]) -> None:
    """Fail early, before any network is loaded, on a file that is damaged or for components that are not there.

    Raises:
        UserError: as `read`, and for a file that has weights for a component which the model has not.
    """
    for file in files:
        parts = read(file)
        for component in parts:
            if component not in present:
                first = [f"{component}.{name}" for name in parts[component]]
                raise UserError(
                    f"{file.path} does not fit this model, which has no {component}: {some(first)}; "
                    f"{made_for(weight_files.shapes(file.path))}",
                    fits_fix(unet_config),
                )
        if not parts:
            raise UserError(f"{file.path} has no LoRA weights", "give another file")


def made_for(tensors: Mapping[str, Any]) -> str:
    """What a LoRA seems to be made for, by its names and the width of its text, as a clause.

    Args:
        tensors: key -> tensor of the file, or anything else with a `shape`.
    """
    if any(
        key.startswith(("lora_te2_", "text_encoder_2.")) or "add_embedding" in key or "label_emb" in key
        for key in tensors
    ):
        return "it seems to be made for SDXL"
    if any(
        re.search(r"double_?blocks|single_?(transformer_)?blocks|joint_?blocks|^transformer\.", key) for key in tensors
    ):
        return "it seems to be made for a diffusion transformer (Flux, SD3 or the like)"
    for key, tensor in tensors.items():
        if re.search(r"attn2[._](processor\.)?to_k", key) and re.search(r"down|lora_A", key) and len(tensor.shape) > 1:
            width = tensor.shape[1]
            return f"it seems to be made for {_WIDTHS.get(width, f'a UNet whose text is {width} wide')}"
    return "its names do not show what it is made for"


def fits_fix(unet_config: Mapping[str, Any]) -> str:
    """What to do about a LoRA that does not fit."""
    width = unet_config.get("cross_attention_dim")
    what = _WIDTHS.get(width) if isinstance(width, int) else None
    kind = f"a LoRA made for {what}" if what else "a LoRA made for this very model"
    return f"give {kind}, with the same layers (a pruned student lacks some of its teacher's)"


def some(found: Sequence[str]) -> str:
    """The first of several names, and how many more there are."""
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
