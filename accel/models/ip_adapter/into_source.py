"""An IP-Adapter and its image encoder as parts of a model's source."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...bundle.kinds import KINDS
from ...errors import Notice, UserError
from ..config_files import read_config
from . import files

if TYPE_CHECKING:
    from torch import nn

NAME = "image_encoder"
_Source = TypeVar("_Source", bound=Any)


def with_ip_adapter(source: _Source, file: str | Path | None, encoder: str | Path | None) -> _Source:
    """The source with an IP-Adapter; without one, an image encoder has nothing to do.

    Args:
        source: an `accel.models.source.Source`.
        file: of the adapter, or None.
        encoder: folder of its image encoder, or one that has it; None for the source's own.

    Raises:
        UserError: for a file or a folder of something else, and one without the other.
    """
    if file is None:
        if encoder is not None:
            raise UserError("an image encoder without an IP-Adapter", "add --ip-adapter FILE")
        return replace(source, index={name: entry for name, entry in source.index.items() if name != NAME})
    files.read(Path(file))  # says now what it is not
    if encoder is not None:
        source = _with_encoder(source, Path(encoder))
    if not source.has(NAME):
        raise UserError(
            f"{source.name} has no image encoder, and an IP-Adapter needs the one that it was trained with",
            "--image-encoder FOLDER: a CLIPVisionModelWithProjection, published beside the adapter",
        )
    return replace(source, ip_adapter=Path(file))


def _with_encoder(source: _Source, path: Path) -> _Source:
    folder = path / NAME if (path / NAME / "config.json").is_file() else path
    named = read_config(folder / "config.json", f"the config of the {NAME}").get("architectures")
    (known,) = KINDS[NAME].classes
    if named not in ([known], known):
        raise UserError(f"{folder} is a {named}", f"give a folder with a {known}")
    index = dict(source.index) | {NAME: [KINDS[NAME].library, known]}
    return replace(source, index=index, folders={**source.folders, NAME: folder})


def completed(source: Any, component: str, model: nn.Module) -> nn.Module:
    """A model of a component of the source, with the IP-Adapter where it is the UNet."""
    if component == "unet" and source.ip_adapter is not None:
        from .unet import add

        add(model, files.read(source.ip_adapter), source.ip_adapter.name)
    return model


def note_left_out(folder: Path, unread: Iterable[str]) -> None:
    """Say that a folder of diffusers' holds an adapter, which it saves with a UNet and does not load.

    Args:
        unread: names of the weights in it that the model has not.
    """
    if any(".to_k_ip." in name for name in unread):
        text = f"{folder} holds weights of an IP-Adapter, which are left out, as by diffusers (--ip-adapter FILE)"
        warnings.warn(text, Notice, stacklevel=4)
