"""Published EDM weights read into `UNet2DModel`: the same graph under other names.

EDM's ImageNet network and DMD2's students of it name their weights by image size, as in
`model.enc.32x32_block0.conv0.weight`. Every difference to diffusers is one of names and layout, and exact:

* one 1x1 convolution `qkv`, its channels ordered (head, channel of the head, q | k | v), becomes three linear layers;
* `map_label`, a linear layer without bias on one-hot rows, becomes a table: its transpose;
* `resample_filter`, the constant 2x2 box of down- and upsampling, is what diffusers' pooling and repetition compute;
* `map_augment`, which reads a training-time augmentation, adds nothing where there is none, and is left out.

Group norm has 32 groups from 128 channels on, and fewer below; diffusers has one number for all levels, so narrower
networks than 128 are refused.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from accel.errors import UserError

from .preconditioning import SIGMA_DATA, Preconditioned, unet_config

_HEAD_WIDTH = 64
_NARROWEST = 128
_BLOCK = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}
_ATTENTION = {"norm2": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "proj": ("to_out.0",)}
_ENDS = {
    "map_layer0": "time_embedding.linear_1",
    "map_layer1": "time_embedding.linear_2",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}


def read(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin`, `.pt`, `.pth` or `.safetensors` file, on the CPU; nothing in it is run.

    Raises:
        UserError: when the file is not there, damaged, or holds something else than tensors; for EDM's `.pkl`, which
            holds code, with how to get its weights out.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}", "give DMD2's pytorch_model.bin, or weights taken out of EDM's .pkl")
    if path.suffix in (".pkl", ".pickle"):
        raise _is_code(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        if isinstance(error, pickle.UnpicklingError) and _head(path) in (b"\x80", b"P"):  # a pickle, or one in a zip
            raise _is_code(path) from None
        line = (
            "it is not a file of torch" if isinstance(error, pickle.UnpicklingError) else str(error).partition("\n")[0]
        )
        raise UserError(f"{path} cannot be read: {line or type(error).__name__}", "get the file again") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold a dict of tensors", "save the network's state_dict() alone")
    return dict(state)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1)


def _is_code(path: Path) -> UserError:
    script = f"import pickle, torch; torch.save(pickle.load(open({path.name!r}, 'rb'))['ema'].state_dict(), 'edm.pt')"
    return UserError(
        f"{path} is a pickle with more in it than weights, which would run as code; nothing of it was run",
        f'if you trust it, take the weights out in a checkout of github.com/NVlabs/edm: python -c "{script}"; then '
        "give edm.pt",
    )


def config_of(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Config of the `UNet2DModel` that weights in EDM's names are for, by their names and shapes.

    Raises:
        UserError: when they are not those of an ADM network, or of one that diffusers cannot be.
    """
    prefix = _prefix(state)
    shapes = {key.removeprefix(prefix): tuple(value.shape) for key, value in state.items()}
    first = next((key for key in shapes if re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", key)), None)
    if first is None or len(shapes[first]) != 4:
        raise _no_edm("the first convolution, such as enc.64x64_conv.weight, is missing")
    size = int(first.partition("x")[0].removeprefix("enc."))
    width, channels = shapes[first][:2]
    blocks = [re.fullmatch(r"enc\.(\d+)x\1_block(\d+)\.conv0\.weight", key) for key in shapes]
    counts: dict[int, int] = {}
    for found in filter(None, blocks):
        counts[int(found[1])] = max(counts.get(int(found[1]), 0), int(found[2]) + 1)
    levels = [size >> level for level in range(len(counts))]
    if sorted(counts, reverse=True) != levels or len(set(counts.values())) != 1:
        raise _no_edm(f"its levels have {counts or 'no'} residual blocks")
    widths = [shapes[f"enc.{cells}x{cells}_block0.conv0.weight"][0] for cells in levels]
    if any(wide % width for wide in widths):
        raise _no_edm(f"its levels are {widths} channels wide")
    if width < _NARROWEST:
        raise UserError(
            f"this network is {width} channels wide; below {_NARROWEST} its group norms have fewer groups in some "
            "places than in others, which diffusers' UNet2DModel has not",
            f"give a network of at least {_NARROWEST} channels; ImageNet's has 192",
        )
    label = shapes.get("map_label.weight")
    return unet_config(
        size=size,
        channels=channels,
        width=width,
        multipliers=[wide // width for wide in widths],
        layers=counts[size],
        head_width=_HEAD_WIDTH,
        classes=label[1] if label else None,
        attention=[cells for cells in levels if f"enc.{cells}x{cells}_block0.qkv.weight" in shapes],
    )


def key_map(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """EDM's weight name -> the names of what it becomes in diffusers, in this order; every weight of the network.

    Args:
        config: of `unet_config`.
    """
    names: dict[str, tuple[str, ...]] = {}

    def add(ours: str, *theirs: str) -> None:
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = tuple(f"{name}.{kind}" for name in theirs)

    for ours, theirs in _ENDS.items():
        add(ours, theirs)
    if config["num_class_embeds"] is not None:
        names["map_label.weight"] = ("class_embedding.weight",)
    add("enc.{0}x{0}_conv".format(config["sample_size"]), "conv_in")
    for block, resnet, attention, widens in _blocks(config):
        for ours, theirs in _BLOCK.items():
            if ours != "skip" or widens:
                add(f"{block}.{ours}", f"{resnet}.{theirs}")
        for ours, parts in _ATTENTION.items() if attention else ():
            add(f"{block}.{ours}", *(f"{attention}.{part}" for part in parts))
    return names


def _blocks(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None, bool]]:
    """(EDM's block, diffusers' resnet, its attention or None, whether its input has another width), for every block."""
    widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
    last = len(widths) - 1
    skips, wide = [widths[0]], widths[0]
    for level, own in enumerate(widths):
        cells = config["sample_size"] >> level
        place, attends = f"down_blocks.{level}", config["down_block_types"][level].startswith("Attn")
        if level:
            yield f"enc.{cells}x{cells}_down", f"down_blocks.{level - 1}.downsamplers.0", None, False
            skips.append(wide)
        for layer in range(layers):
            attention = f"{place}.attentions.{layer}" if attends else None
            yield f"enc.{cells}x{cells}_block{layer}", f"{place}.resnets.{layer}", attention, wide != own
            wide = own
            skips.append(own)
    for level in range(last, -1, -1):
        cells = config["sample_size"] >> level
        place, attends = f"up_blocks.{last - level}", config["up_block_types"][last - level].startswith("Attn")
        if level == last:
            yield f"dec.{cells}x{cells}_in0", "mid_block.resnets.0", "mid_block.attentions.0", False
            yield f"dec.{cells}x{cells}_in1", "mid_block.resnets.1", None, False
        else:
            yield f"dec.{cells}x{cells}_up", f"up_blocks.{last - level - 1}.upsamplers.0", None, False
        for layer in range(layers + 1):
            attention = f"{place}.attentions.{layer}" if attends else None
            own = widths[level]
            yield f"dec.{cells}x{cells}_block{layer}", f"{place}.resnets.{layer}", attention, wide + skips.pop() != own
            wide = own


def convert(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in EDM's names as a `UNet2DModel`'s, in the dtype they have; the config is `config_of(state)`.

    Raises:
        UserError: when a weight is missing or has no place, or resampling is not by the 2x2 box.
    """
    prefix, names = _prefix(state), key_map(config_of(state))
    given = {key.removeprefix(prefix): value for key, value in state.items()}
    for key in [key for key in given if key.endswith(".resample_filter")]:
        box = given.pop(key)
        if tuple(box.shape[-2:]) != (2, 2) or not torch.equal(box.float(), torch.full_like(box, 0.25).float()):
            raise UserError(f"{key} is not the 2x2 box that ADM resamples with", "give an EDM network of the ADM kind")
    given.pop("map_augment.weight", None)
    if missing := [key for key in names if key not in given]:
        raise _no_edm(f"{len(missing)} weights are missing, first {missing[0]}")
    if strange := [key for key in given if key not in names]:
        raise _no_edm(f"{len(strange)} weights have no place, first {strange[0]}")
    made: dict[str, torch.Tensor] = {}
    for key, targets in names.items():
        parts = _parts(key, given[key], len(targets))
        made |= {name: part.contiguous() for name, part in zip(targets, parts, strict=True)}
    return made


def _parts(key: str, value: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    if key == "map_label.weight":
        return (value.T,)
    if count == 3:
        # Channel 3 c + i of qkv is channel c of q, k or v, whatever the number of heads: heads are consecutive in both.
        if value.shape[0] % 3:
            raise _no_edm(f"{key} has {value.shape[0]} rows")
        return tuple(
            value.flatten(1).unflatten(0, (-1, 3)).unbind(1)
            if key.endswith("weight")
            else value.unflatten(0, (-1, 3)).unbind(1)
        )
    return (value.flatten(1) if key.endswith(".proj.weight") else value,)


def load(path: str | Path, sigma_data: float = SIGMA_DATA) -> Preconditioned:
    """D of a published checkpoint, in float32 on the CPU, ready to run or to train.

    Raises:
        UserError: as `read` and `convert`; and when a weight has another shape than its network gives it.
    """
    from diffusers import UNet2DModel

    state = read(path)
    config, weights = config_of(state), convert(state)
    with torch.device("meta"):
        unet = UNet2DModel(**config)
    wanted = unet.state_dict()
    for name, value in weights.items():
        if value.shape != wanted[name].shape:
            raise _no_edm(f"{name} has shape {list(value.shape)} where {list(wanted[name].shape)} belongs")
    unet.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    return Preconditioned(unet, sigma_data).eval()


def _prefix(state: Mapping[str, Any]) -> str:
    """What stands before every name: `model.`, or more where a wrapper was saved."""
    found = [key.removesuffix("map_layer0.weight") for key in state if key.endswith("map_layer0.weight")]
    if not found:
        raise _no_edm("the noise level's map, map_layer0.weight, is missing")
    if len(found) > 1:
        raise UserError(
            f"this file holds {len(found)} networks: {', '.join(found)}",
            "give the generator's file; DMD2 writes it as pytorch_model.bin, and the critic's as pytorch_model_1.bin",
        )
    return found[0]


def _no_edm(problem: str) -> UserError:
    return UserError(
        f"these are not the weights of EDM's ADM network: {problem}",
        "give edm-imagenet-64x64-cond-adm, or a student of it by DMD2",
    )


def main() -> None:
    """A published checkpoint to a folder that `accel distill dmd2 --model` and diffusers' UNet2DModel read."""
    import argparse

    from accel.files import new_folder

    from .source import save_edm

    parser = argparse.ArgumentParser(prog="python -m accel.distill.edm.weights", description=main.__doc__)
    parser.add_argument("file", type=Path, help=".bin, .pt or .safetensors with EDM's names")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")
    args = parser.parse_args()
    try:
        net = load(args.file)
        with new_folder(args.folder, overwrite=args.overwrite) as folder:
            save_edm(folder, net)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{args.folder} is ready: accel distill dmd2 --model {args.folder} --recipe dmd2_imagenet64 --data ...")


if __name__ == "__main__":
    main()
