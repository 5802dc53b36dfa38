"""Students: a teacher's config with parts left out, and a map from the student's weights to the teacher's.

A student is always built from a config and filled by copying, never cut out of a live teacher: so its config is the
truth about it, and what is saved can be loaded by diffusers as it is. The maps follow BK-SDM (arXiv 2305.15798) for
`base`, `small` and `tiny`, and SSD-1B / Vega (arXiv 2401.02677) for the SDXL depths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from accel.errors import UserError, unknown
from accel.models.topology import remove_blocks, topology

BLOCK_REMOVED = ("base", "small", "tiny")
DEPTH_PRUNED = ("ssd-1b", "vega")
KINDS = (*BLOCK_REMOVED, *DEPTH_PRUNED)
LAYER_RULES = ("first", "spread")

_BLOCK = re.compile(r"(.*\.attentions\.\d+)\.transformer_blocks\.(\d+)\.(.*)")


def student_config(teacher: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Config of the student `kind` of a teacher, whatever the teacher's width, resolution and input channels.

    Raises:
        UserError: for an unknown kind, or a teacher that this kind cannot be made of.
    """
    if kind not in KINDS:
        raise unknown("student", kind, KINDS)
    config = {key: value for key, value in teacher.items() if not key.startswith("_")}
    stages = len(config["block_out_channels"])
    if kind in BLOCK_REMOVED:
        if stages != 4 or config.get("layers_per_block") != 2 or config.get("mid_block_type", "") is None:
            raise UserError(
                f"{kind} is made of a UNet with four stages of two layers and a mid block (SD1.x, SD2.x); this one has "
                f"{stages} stages, layers_per_block {config.get('layers_per_block')}, mid_block_type "
                f"{config.get('mid_block_type')}",
                "give a full SD1.x or SD2.x pipeline as the teacher"
                + (f", or for SDXL one of: {', '.join(DEPTH_PRUNED)}" if stages == 3 else ""),
            )
        return remove_blocks(config, kind)
    if stages != 3 or config.get("addition_embed_type") != "text_time":
        raise UserError(
            f"{kind} is made of SDXL; this teacher has {stages} stages and no SDXL size conditioning",
            f"give an SDXL pipeline as the teacher, or choose one of: {', '.join(BLOCK_REMOVED)}",
        )
    pruned = topology(kind).config
    fields = ("mid_block_type", "transformer_layers_per_block", "reverse_transformer_layers_per_block")
    return config | {name: pruned.get(name) for name in fields}


def key_map(student: Mapping[str, Any], teacher: Mapping[str, Any], kind: str, layers: str = "first") -> dict[str, str]:
    """Student weight name -> the teacher weight it starts from, for every weight of the student.

    Args:
        student, teacher: anything with the two state dicts' keys.
        kind: a member of KINDS.
        layers: which transformer layers survive where the student has fewer: see `surviving`.

    Raises:
        UserError: when the teacher lacks a weight, or `layers` does not fit.
    """
    rename = _depths(student, teacher, layers) if kind in DEPTH_PRUNED else block_source(kind)
    names = {name: rename(name) for name in student}
    lost = [f"{name} <- {source}" for name, source in names.items() if source not in teacher]
    if lost:
        raise UserError(
            f"the teacher has not what the student {kind} starts from: {lost[0]} and {len(lost) - 1} more",
            "is the teacher a full model, and not a student already?",
        )
    return names


def block_source(kind: str) -> Callable[[str], str]:
    """Name of a module or weight of the student -> name of what it starts from, as far as whole blocks go."""
    return {"base": _base, "small": _base, "tiny": _tiny}.get(kind, str)


def _base(name: str) -> str:
    # The last layer of an up block takes the skip of the stage before, so it is the middle one that goes.
    return re.sub(r"^(up_blocks\.\d+\.(?:resnets|attentions))\.1(?=\.|$)", r"\1.2", name)


def _tiny(name: str) -> str:
    # The fourth stage is gone on either side, and the up blocks count from the inside.
    return re.sub(r"^up_blocks\.(\d+)\.", lambda found: f"up_blocks.{int(found[1]) + 1}.", _base(name))


def _depths(student: Mapping[str, Any], teacher: Mapping[str, Any], layers: str) -> Callable[[str], str]:
    ours, theirs = _depth(student), _depth(teacher)
    kept = {}
    for place, count in ours.items():
        if count > theirs.get(place, 0):
            raise UserError(
                f"{place}: the student has {count} transformer layers, the teacher {theirs.get(place, 0)}",
                "give a full SDXL pipeline as the teacher",
            )
        kept[place] = surviving(theirs[place], count, layers)

    def rename(name: str) -> str:
        found = _BLOCK.fullmatch(name)
        return name if not found else f"{found[1]}.transformer_blocks.{kept[found[1]][int(found[2])]}.{found[3]}"

    return rename


def _depth(names: Mapping[str, Any]) -> dict[str, int]:
    """Transformer layers of every attention module, from the names of the weights."""
    depth: dict[str, int] = {}
    for name in names:
        if found := _BLOCK.fullmatch(name):
            depth[found[1]] = max(depth.get(found[1], 0), int(found[2]) + 1)
    return depth


def surviving(teacher: int, student: int, layers: str = "first") -> tuple[int, ...]:
    """Which of the teacher's transformer layers, counted from 0, the student keeps.

    Args:
        teacher, student: layer counts.
        layers: `first` (the default; which ones SSD-1B kept is not published, and two to one is known to keep the
            first), `spread` (evenly, the first and the last included), or an explicit list per pair of depths, such as
            `10:4=0,1,2,6;2:1=0`; pairs that are not listed keep the first.

    Raises:
        UserError: when `layers` is none of these or does not fit.
    """
    if teacher == student or layers == "first":
        return tuple(range(student))
    if layers == "spread":
        return tuple(round(index * (teacher - 1) / max(1, student - 1)) for index in range(student))
    kept = _explicit(layers).get((teacher, student), tuple(range(student)))
    if len(set(kept)) != student or list(kept) != sorted(kept) or not all(0 <= layer < teacher for layer in kept):
        raise UserError(
            f"layers {teacher}:{student}={','.join(map(str, kept))} does not name {student} different layers of 0 to "
            f"{teacher - 1} in rising order",
            f"for example {teacher}:{student}={','.join(map(str, range(student)))}",
        )
    return kept


def _explicit(layers: str) -> dict[tuple[int, int], tuple[int, ...]]:
    entry = re.compile(r"\s*(\d+):(\d+)=(\d+(?:,\d+)*)\s*")
    found = [entry.fullmatch(part) for part in layers.split(";")]
    if not all(found):
        raise UserError(
            f"layers {layers!r} is neither {' nor '.join(LAYER_RULES)} nor a list",
            "write it like 10:4=0,1,2,6;2:1=0 (teacher depth:student depth=layers kept, counted from 0)",
        )
    return {(int(m[1]), int(m[2])): tuple(int(layer) for layer in m[3].split(",")) for m in found if m}


def make_student(teacher: nn.Module, kind: str, *, layers: str = "first", init: str = "copy", seed: int = 0) -> Any:
    """A new `UNet2DConditionModel` in float32 on the CPU.

    Args:
        teacher: the full UNet; it is only read.
        kind: a member of KINDS.
        layers: see `surviving`.
        init: `copy` the teacher's weights, or `random` (what distillation starts from when nothing is copied).
        seed: of the random weights.
    """
    from diffusers import UNet2DConditionModel

    if init not in ("copy", "random"):
        raise unknown("init", init, ("copy", "random"))
    config = student_config(teacher.config, kind)
    if init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return UNet2DConditionModel.from_config(config)
    with torch.device("meta"):
        student = UNet2DConditionModel.from_config(config)
    weights = teacher.state_dict()
    source = key_map(student.state_dict(), weights, kind, layers)
    copies = {ours: weights[theirs].detach().to("cpu", torch.float32, copy=True) for ours, theirs in source.items()}
    student.load_state_dict({name: copy.contiguous() for name, copy in copies.items()}, assign=True)
    return student.requires_grad_(True)
