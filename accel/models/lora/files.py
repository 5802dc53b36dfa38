"""LoRA files as they are asked for: which file, how strongly, and how strongly in each block."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from ...errors import UserError
from ...files import sha256

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
COMPONENTS = ("text_encoder_2", "text_encoder", "unet")
# diffusers' words for the blocks of a UNet.
_BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
_EXAMPLE = "such as 'style.safetensors=0.8', ('style.safetensors', 0.8) or {'path': 'style.safetensors', 'scale': 0.8}"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, and how strongly it counts.

    Attributes:
        path: the file.
        scale: what its update is multiplied by.
        blocks: (prefix, scale) for parts of the networks, such as ("unet.mid_block", 0.5) or ("text_encoder", 0.0),
            instead of `scale`; of several that fit a layer the longest counts.
    """

    path: Path
    scale: float = 1.0
    blocks: tuple[tuple[str, float], ...] = ()

    def record(self) -> dict[str, Any]:
        """What the manifest and the digest record: name, sha256, scale, and the blocks where there are any."""
        blocks = {"blocks": dict(self.blocks)} if self.blocks else {}
        return {"name": self.path.name, "sha256": sha256(self.path), "scale": self.scale} | blocks

    def __str__(self) -> str:
        return f"{self.path.name}={self.scale:g}" + "".join(f", {block}={scale:g}" for block, scale in self.blocks)

    def strength(self, component: str, module: str) -> float:
        """The scale of one layer."""
        fitting = [entry for entry in self.blocks if _within(f"{component}.{module}", entry[0])]
        return max(fitting, key=lambda entry: len(entry[0]))[1] if fitting else self.scale

    def check_blocks(self, component: str, modules: Iterable[str]) -> None:
        """Refuse a scale for a block of a component that none of the file's layers lies in: it is likely misspelt."""
        layers = [f"{component}.{module}" for module in modules]
        for prefix, _ in self.blocks:
            if prefix.partition(".")[0] == component and not any(_within(layer, prefix) for layer in layers):
                places = sorted({".".join(layer.split(".")[:3]) for layer in layers}) or ["no layer there"]
                raise UserError(
                    f"{self.path} has no layer in {prefix}, which a scale is given for",
                    f"it has: {', '.join(places[:12])}{' and more' * (len(places) > 12)}",
                )


Spec = Union[str, "os.PathLike[str]", LoraFile, Sequence[Any], Mapping[str, Any]]


def lora_file(spec: Spec) -> LoraFile:
    """What is meant by `FILE`, `FILE=SCALE`, (FILE, SCALE) or {"path": FILE, "scale": SCALE, "blocks": {...}}.

    A folder stands for the LoRA that diffusers' `save_lora_weights` wrote into it. A scale may also be the table that
    diffusers' `set_adapters` takes: {"text_encoder": 0.5, "unet": {"down": 0.9, "up": {"block_1": [0.4, 0.8, 1]}}}.

    Raises:
        UserError: when there is no such file, or a scale is not a number.
    """
    if isinstance(spec, LoraFile):
        return spec
    if isinstance(spec, Mapping):
        if "path" not in spec or (strange := set(spec) - {"path", "scale", "blocks"}):
            what = "it has no path" if "path" not in spec else f"it has no field {strange.pop()!r}"
            raise UserError(f"invalid LoRA {dict(spec)!r:.200}: {what}", _EXAMPLE)
        return _made(spec["path"], spec.get("scale", 1.0), spec.get("blocks") or {})
    if isinstance(spec, (str, os.PathLike)):
        text: str = os.fspath(spec)
        if Path(text).exists() or "=" not in text:
            return _made(text, 1.0, {})
        return _made(*text.rpartition("=")[::2], {})
    if isinstance(spec, Sequence) and len(spec) == 2:
        return _made(spec[0], spec[1], {})
    raise UserError(f"invalid LoRA: {spec!r:.200}", _EXAMPLE)


def lora_files(specs: Spec | Sequence[Spec] | None) -> tuple[LoraFile, ...]:
    """Several of them; a single one is taken too, and None for none.

    Raises:
        UserError: as `lora_file`.
    """
    if specs is None:
        return ()
    if isinstance(specs, (str, os.PathLike, LoraFile, Mapping)):
        specs = [specs]
    if not isinstance(specs, Sequence):
        raise UserError(f"invalid LoRA files: {specs!r:.200} (expected a list)", _EXAMPLE)
    return tuple(lora_file(spec) for spec in specs)


def _made(path: Any, scale: Any, blocks: Mapping[str, Any]) -> LoraFile:
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"invalid LoRA file: {path!r:.200}", _EXAMPLE)
    file = Path(path).expanduser()
    if isinstance(scale, Mapping):
        scale, blocks = 1.0, {**scale, **blocks}
    number = _number(scale, f"for example {file}=0.8")
    if file.is_dir():
        file = file / WEIGHT_NAME
    if not file.is_file():
        raise UserError(f"no such LoRA file: {file}", "give a .safetensors file, or a folder of save_lora_weights")
    return LoraFile(file, number, tuple(_flat("", blocks)))


def _flat(prefix: str, blocks: Any) -> Iterator[tuple[str, float]]:
    """(prefix, scale) of a table of scales, in names of the networks or in diffusers' words."""
    if isinstance(blocks, Mapping):
        for key, value in blocks.items():
            yield from _flat(_joined(prefix, str(key)), value)
    elif isinstance(blocks, (list, tuple)):
        for place, value in enumerate(blocks):
            yield from _flat(f"{prefix}.attentions.{place}", value)
    else:
        yield prefix, _number(blocks, f"a number for {prefix}, for example 0.8")


def _joined(prefix: str, key: str) -> str:
    if not prefix and key.partition(".")[0] not in COMPONENTS:
        prefix = "unet"
    key = _BLOCKS.get(key, key.removeprefix("block_"))
    return f"{prefix}.{key}" if prefix else key


def _number(value: Any, example: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"invalid LoRA scale: {value!r:.80} (expected a number)", example)
    return number


def _within(layer: str, prefix: str) -> bool:
    return layer == prefix or layer.startswith(f"{prefix}.")
