"""Published files of an IP-Adapter: read as weights, and matched with a UNet and an image encoder before any work.

The layout is that of the authors (github.com/tencent-ailab/IP-Adapter): `image_proj` makes tokens of an image, and
`ip_adapter` holds keys and values of every cross-attention, numbered 1, 3, 5, ... in the order of diffusers' UNet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from .. import weight_files

if TYPE_CHECKING:
    import torch

_GROUPS = ("image_proj", "ip_adapter")
_LAYER = re.compile(r"(\d{1,4})\.to_([kv])_ip\.weight")
_FAMILY = "give an IP-Adapter that was made for this family (ip-adapter_sd15, ip-adapter_sdxl, ...)"
_ENCODER = (
    "give the image encoder that it was trained with: --image-encoder FOLDER (models/image_encoder, or sdxl_models/...)"
)


@dataclass(frozen=True)
class Kind:
    """A kind of IP-Adapter.

    Attributes:
        name: as its files are called.
        hidden_states: whether it takes the image encoder's last but one hidden states [tokens, width] in place of the
            projected embedding [width].
        width: name of the weight of `image_proj` that takes them, whose last axis is their width.
    """

    name: str
    hidden_states: bool
    width: str


PLAIN = Kind("ip-adapter", False, "proj.weight")
FULL = Kind("ip-adapter-full-face", True, "proj.0.weight")
PLUS = Kind("ip-adapter-plus", True, "proj_in.weight")

State = Mapping[str, Mapping[str, "torch.Tensor"]]


def read(path: Path) -> State:
    """The weights of a file: {"image_proj": {name: tensor}, "ip_adapter": {name: tensor}}, as diffusers takes them.

    Raises:
        UserError: for a file that is no IP-Adapter's, or of a kind that is not supported.
    """
    state: dict[str, dict[str, torch.Tensor]] = {group: {} for group in _GROUPS}
    for key, tensor in weight_files.read_groups(path).items():
        group, _, name = key.partition(".")
        if group in state:
            state[group][name] = tensor
    if not all(state.values()):
        missing = next(group for group in _GROUPS if not state[group])
        raise UserError(
            f"{path} is not an IP-Adapter: it has no {missing} weights",
            "give a file such as ip-adapter_sd15.safetensors (models/ of h94/IP-Adapter)",
        )
    kind_of(state, path.name)
    return state


def kind_of(state: State, name: str) -> Kind:
    """Which kind of adapter the weights are of.

    Args:
        name: of the file, for messages.

    Raises:
        UserError: for a kind that is not supported.
    """
    projection = state["image_proj"]
    face = "perceiver_resampler.proj_in.weight" in projection or any("_lora." in key for key in state["ip_adapter"])
    if face or "norm.weight" in projection and "proj.0.weight" in projection and "proj.3.weight" not in projection:
        raise UserError(
            f"{name} is an IP-Adapter for Face ID: it is shown the embedding of a face by a face-recognition network, "
            "which is not part of a pipeline",
            "give ip-adapter, ip-adapter-plus, ip-adapter-plus-face or ip-adapter-full-face",
        )
    marks = {PLAIN: ("proj.weight",), FULL: ("proj.0.weight", "proj.3.weight"), PLUS: ("latents", "proj_in.weight")}
    for kind, needed in marks.items():
        if all(key in projection for key in needed):
            return kind
    raise UserError(
        f"{name}: its image projection is of no known kind (it has {', '.join(sorted(projection)[:3])}, ...)",
        "give ip-adapter, ip-adapter-plus, ip-adapter-plus-face or ip-adapter-full-face",
    )


def match(state: State, name: str, unet: Any, encoder: Any) -> Kind:
    """The kind of an adapter that fits.

    Args:
        name: of the file, for messages.
        unet: diffusers' UNet2DConditionModel; its weights are not read.
        encoder: config of the image encoder, a CLIPVisionConfig.

    Raises:
        UserError: for an adapter of another family, or for another image encoder, with both sides' widths.
    """
    kind = kind_of(state, name)
    layers = [unet.get_submodule(key.removesuffix(".processor")) for key in unet.attn_processors if "attn2" in key]
    own = {
        f"{2 * i + 1}.to_{part}_ip.weight": (layer.to_k.out_features, layer.to_k.in_features)
        for i, layer in enumerate(layers)
        for part in "kv"
    }
    theirs = {key: tuple(tensor.shape) for key, tensor in state["ip_adapter"].items()}
    if odd := [key for key in theirs if not _LAYER.fullmatch(key)]:
        raise UserError(f"{name} has weights that no IP-Adapter has, {odd[0]!r:.80} for one", "get the file again")
    if theirs != own:
        raise UserError(
            f"{name} is for another UNet: it has {_text(theirs)}, this UNet has {_text(own)}",
            _FAMILY if len(theirs) != len(own) or _widths(theirs) != _widths(own) else "get the file again",
        )
    width = state["image_proj"][kind.width].shape[-1]
    given = encoder.hidden_size if kind.hidden_states else encoder.projection_dim
    if width != given:
        what = "hidden states" if kind.hidden_states else "embedding"
        raise UserError(f"{name} takes an {what} of width {width}, and the image encoder gives {given}", _ENCODER)
    return kind


def _widths(shapes: Mapping[str, tuple[int, ...]]) -> set[int]:
    return {shape[-1] for shape in shapes.values() if shape}


def _text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    outer = sorted({shape[0] for shape in shapes.values() if shape})
    context = sorted(_widths(shapes))
    return (
        f"{len(shapes) // 2} cross-attentions of widths {', '.join(map(str, outer))} "
        f"over a context of width {', '.join(map(str, context))}"
    )
