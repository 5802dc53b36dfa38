"""LoRA files fused into a network's weights (Hu et al. 2021, arXiv 2106.09685).

    W' = W + scale * alpha / r * B A            A: down [r, in, ...], B: up [out, r, ...]

diffusers' and kohya's files are read by diffusers' own conversion; peft is not needed. A tensor for a layer that the
model does not have is an error, because half a LoRA is another LoRA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..files import parse_json, sha256
from . import weight_files

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
COMPONENTS = ("text_encoder_2", "text_encoder", "unet")
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_OTHER_KINDS = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    ".lora_mid.": "a Tucker decomposition",
    ".glora_": "GLoRA",
    "lora_embedding_": "LoRA of embeddings",
}
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
_SHOWN = 3  # how many keys an error names


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file and the scale that its update is multiplied by."""

    path: Path
    scale: float = 1.0

    def record(self) -> dict[str, Any]:
        """What the manifest and the digest record: name, sha256, scale."""
        return {"name": self.path.name, "sha256": sha256(self.path), "scale": self.scale}


@dataclass(frozen=True)
class Update:
    """The low-rank change of one module: weight += factor * up @ down, bias += factor * bias. All float32."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    factor: float


def lora_file(spec: str | Path | LoraFile) -> LoraFile:
    """`FILE` or `FILE=SCALE`; a folder stands for the LoRA that diffusers' `save_lora_weights` wrote into it.

    Raises:
        UserError: when there is no such file, or the scale is not a number.
    """
    if isinstance(spec, LoraFile):
        return spec
    text, scale = str(spec), 1.0
    if not Path(text).exists() and "=" in text:
        text, _, number = text.rpartition("=")
        try:
            scale = float(number)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise UserError(f"invalid LoRA scale: {number!r} (expected a number)", f"for example {text}=0.8")
    path = Path(text).expanduser()
    if path.is_dir():
        path = path / WEIGHT_NAME
    if not path.is_file():
        raise UserError(f"no such LoRA file: {path}", "give a .safetensors file, or a folder of save_lora_weights")
    return LoraFile(path, scale)


def read(file: LoraFile, unet_config: Mapping[str, Any]) -> dict[str, dict[str, Update]]:
    """Component -> module name -> update, in diffusers' names.

    Args:
        file: diffusers' format (with or without alpha in its metadata), peft's, or kohya's.
        unet_config: of the model it is for; kohya's SDXL files number blocks as the original code does.

    Raises:
        UserError: when the file cannot be read, or holds anything but LoRA weights.
    """
    tensors, metadata = _open(file.path)
    for key in tensors:
        if key.startswith("base_model."):
            # Its alpha lies in another file; without it the LoRA would be fused at a wrong strength.
            raise UserError(
                f"{file.path} is peft's own format: {key}", "save it with diffusers: pipeline.save_lora_weights(...)"
            )
        for mark, kind in _OTHER_KINDS.items():
            if mark in key:
                raise UserError(
                    f"{file.path} is not a plain LoRA but {kind}: {key}",
                    "fuse it with the tool it was made with, and export the fused pipeline",
                )
    kohya = [key for key in tensors if key.startswith(_KOHYA)]
    if kohya and len(kohya) < len(tensors):
        others = [key for key in tensors if not key.startswith(_KOHYA)]
        raise UserError(f"{file.path} mixes two formats: {kohya[0]} and {_some(others)}", "convert it to one of them")
    if kohya:
        tensors = _folded(tensors, file.path)
    try:
        parts = _converted(tensors, unet_config)
    except Exception as error:  # diffusers' conversions fail anywhere in the middle
        raise UserError(
            f"{file.path} cannot be understood: {_line(error)}; {made_for(tensors)}", _fits_fix(unet_config)
        ) from None
    return {component: _updates(part, _settings(metadata, component), file.path) for component, part in parts.items()}


def fuse(
    model: nn.Module, component: str, files: Sequence[LoraFile], *, unet_config: Mapping[str, Any] | None = None
) -> nn.Module:
    """Add LoRA files to a component's weights, in place; sums of several do not depend on their order.

    Equals diffusers' `load_lora_weights`, `set_adapters` with the scales, and `fuse_lora`. Nothing is changed when
    anything does not fit.

    Args:
        model: the UNet or a text encoder, float32.
        component: unet, text_encoder or text_encoder_2.
        files: what to add; those without weights for this component change nothing.
        unet_config: needed for a text encoder; the UNet's own by default.

    Raises:
        UserError: as `read`; or when a file names modules that the model does not have, or of other shapes.
    """
    unet_config = unet_config if unet_config is not None else dict(model.config)
    changes: list[tuple[nn.Parameter, torch.Tensor]] = []
    modules = dict(model.named_modules())
    for file in files:
        updates = read(file, unet_config).get(component, {})
        misfits = []
        for name, update in updates.items():
            module = next((modules[alias] for alias in weight_files.aliases(name) if alias in modules), None)
            problem = _misfit(module, update)
            if problem:
                misfits.append(f"{component}.{name} ({problem})")
                continue
            delta = update.up.flatten(1) @ update.down.flatten(1)
            changes.append((module.weight, file.scale * update.factor * delta.reshape(module.weight.shape)))
            if update.bias is not None:
                changes.append((module.bias, file.scale * update.factor * update.bias))
        if misfits:
            raise UserError(
                f"{file.path} does not fit this model: {len(misfits)} of its {len(updates)} modules of the {component} "
                f"have no place, first {_some(misfits)}; {made_for(_open(file.path)[0])}",
                _fits_fix(unet_config),
            )
    with torch.no_grad():
        for parameter, delta in changes:
            parameter += delta.to(parameter)
    return model


def check_components(files: Iterable[LoraFile], present: Sequence[str], unet_config: Mapping[str, Any]) -> None:
    """Fail early, before any network is loaded, on a file that is damaged or for components that are not there.

    Raises:
        UserError: as `read`, and for a file that has weights for a component which the model has not.
    """
    for file in files:
        parts = read(file, unet_config)
        for component in parts:
            if component not in present:
                first = [f"{component}.{name}" for name in parts[component]]
                raise UserError(
                    f"{file.path} does not fit this model, which has no {component}: {_some(first)}; "
                    f"{made_for(_open(file.path)[0])}",
                    _fits_fix(unet_config),
                )
        if not parts:
            raise UserError(f"{file.path} has no LoRA weights", "give another file")


def made_for(tensors: Mapping[str, torch.Tensor]) -> str:
    """What a LoRA seems to be made for, by its names and the width of its text, as a clause."""
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
        if re.search(r"attn2[._](processor\.)?to_k", key) and re.search(r"down|lora_A", key) and tensor.dim() > 1:
            width = tensor.shape[1]
            return f"it seems to be made for {_WIDTHS.get(width, f'a UNet whose text is {width} wide')}"
    return "its names do not show what it is made for"


def _open(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, float32 or as stored where not floating, and the header's metadata."""
    tensors = weight_files.read(path)
    return (
        {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()},
        weight_files.metadata(path),
    )


def _folded(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """kohya's tensors with alpha / r inside `up`, so that no alpha is lost where names are converted."""
    made = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    for key, alpha in tensors.items():
        if not key.endswith(".alpha"):
            continue
        name = key.removesuffix(".alpha")
        down, up = (made.get(f"{name}.lora_{part}.weight") for part in ("down", "up"))
        if down is None or up is None or alpha.numel() != 1 or not down.numel():
            raise UserError(f"{path} is incomplete: {key} stands without its weights", "get the file again")
        made[f"{name}.lora_up.weight"] = up * (float(alpha) / down.shape[0])
    return made


def _converted(
    tensors: Mapping[str, torch.Tensor], unet_config: Mapping[str, Any]
) -> dict[str, dict[str, torch.Tensor]]:
    """Component -> tensors in peft's names (module.lora_A.weight), by diffusers' conversions."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    state, _ = StableDiffusionXLPipeline.lora_state_dict(dict(tensors), unet_config=SimpleNamespace(**unet_config))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        # A file of the time before prefixes holds the UNet alone.
        component = next((name for name in COMPONENTS if key.startswith(f"{name}.")), "unet")
        parts.setdefault(component, {})[key.removeprefix(f"{component}.")] = value
    for component, part in parts.items():
        if component == "unet":
            parts[component] = convert_unet_state_dict_to_peft(part)
        else:
            named = convert_state_dict_to_peft(part, original_type=StateDictType.DIFFUSERS_OLD)
            parts[component] = {
                key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): value
                for key, value in named.items()
            }
    return parts


def _updates(part: Mapping[str, torch.Tensor], settings: Mapping[str, Any], path: Path) -> dict[str, Update]:
    made = {}
    known = re.compile(r"(.+)\.lora_(A|B)\.(?:default\.)?(weight|bias)")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in part.items():
        match = known.fullmatch(key)
        if not match:
            raise UserError(f"{path} holds a tensor that is not a LoRA weight: {key}", "give a LoRA file")
        found.setdefault(match[1], {})[f"{match[2]}.{match[3]}"] = value
    for name, tensors in found.items():
        if "A.weight" not in tensors or "B.weight" not in tensors or "A.bias" in tensors:
            raise UserError(f"{path} is incomplete: {name} has {', '.join(sorted(tensors))}", "get the file again")
        down, up = tensors["A.weight"], tensors["B.weight"]
        if not down.numel() or not up.numel() or down.dim() not in (2, 4) or up.dim() not in (2, 4):
            raise UserError(f"{path}: {name} has shapes {list(down.shape)} and {list(up.shape)}", "give a LoRA file")
        made[name] = Update(down, up, tensors.get("B.bias"), _factor(settings, name, down.shape[0], path))
    return made


def _settings(metadata: Mapping[str, str], component: str) -> dict[str, Any]:
    """peft's settings of a component, as diffusers keeps them in the header; empty where there are none."""
    try:
        kept = parse_json(metadata.get(METADATA, "{}"))
    except ValueError:
        return {}
    prefix = f"{component}."
    fields = kept.items() if isinstance(kept, dict) else ()
    return {key.removeprefix(prefix): value for key, value in fields if key.startswith(prefix)}


def _factor(settings: Mapping[str, Any], name: str, rank: int, path: Path) -> float:
    """alpha / r of one module. Without an alpha it is 1, which is diffusers' convention."""
    if not settings:
        return 1.0
    alpha, patterns = settings.get("lora_alpha", rank), settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{path}: alpha_pattern is {patterns!r:.80}, not a table", "get the file again")
    for pattern, value in patterns.items():
        # peft takes regular expressions; what files hold are names. An expression could take forever.
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise UserError(
                f"{path}: alpha_pattern names no module but an expression, {pattern!r:.80}",
                "fuse it with the tool it was made with, and export the fused pipeline",
            )
        if f".{name}".endswith(f".{plain}"):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
        raise UserError(f"{path}: the alpha of {name} is {alpha!r:.80}, not a number", "get the file again")
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _misfit(module: nn.Module | None, update: Update) -> str:
    """Why an update cannot be added to a module; "" where it can."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() not in (2, 4):
        return "no such layer"
    down, up = update.down, update.up
    shape = (up.shape[0], *down.shape[1:])
    # A 1 x 1 convolution and a linear layer are the same thing in two spellings.
    if (
        down.dim() not in (2, 4)
        or up.dim() not in (2, 4)
        or up.flatten(1).shape[1] != down.shape[0]
        or [side for side in shape[2:] if side != 1] != [side for side in weight.shape[2:] if side != 1]
        or shape[:2] != weight.shape[:2]
    ):
        return f"{list(shape)}, the model's is {list(weight.shape)}"
    if not all(torch.isfinite(tensor).all() for tensor in (down, up)):
        return "not finite"
    if update.bias is not None and (module.bias is None or module.bias.shape != update.bias.shape):
        return "a bias that the layer has not"
    return ""


def _fits_fix(unet_config: Mapping[str, Any]) -> str:
    width = unet_config.get("cross_attention_dim")
    what = _WIDTHS.get(width) if isinstance(width, int) else None
    kind = f"a LoRA made for {what}" if what else "a LoRA made for this very model"
    return f"give {kind}, with the same layers (a pruned student lacks some of its teacher's)"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
