"""Which inner activations of the student are pulled to which of the teacher's, as pairs of module names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from accel.errors import UserError, unknown

from .students import block_source

SETS = ("nota", "segmind", "layers")

Pair = tuple[str, str]


def pairs(name: str, kind: str, student: nn.Module) -> list[Pair]:
    """Pairs (teacher module, student module) of a feature set.

    Args:
        name: `nota` (BK-SDM: block outputs without the mid block; for tiny the innermost down block by its last
            transformer's `proj_out`), `segmind` (Distill-SD: block outputs with the mid block; for tiny the teacher's
            first up block against the student's last down block, both 1280 channels wide in SD1.5), or `layers`
            (SSD-1B: every resnet and every transformer of the down and up blocks, and the mid block).
        kind: a member of `students.KINDS`.
        student: the student UNet, whose layers are named.

    Raises:
        UserError: for an unknown set.
    """
    if name not in SETS:
        raise unknown("feature set", name, SETS)
    if name == "layers":
        return _layers(kind, student)
    downs, ups = len(student.down_blocks), len(student.up_blocks)
    if kind != "tiny":
        middle = [("mid_block", "mid_block")] if name == "segmind" and student.mid_block is not None else []
        down = [(f"down_blocks.{index}",) * 2 for index in range(downs)]
        return [*down, *middle, *((f"up_blocks.{index}",) * 2 for index in range(ups))]
    inner = {
        "nota": ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
        "segmind": ("up_blocks.0", "down_blocks.2"),
    }[name]
    outer = [(f"up_blocks.{index + 1}", f"up_blocks.{index}") for index in range(ups)]
    return [("down_blocks.0",) * 2, ("down_blocks.1",) * 2, inner, *outer]


def _layers(kind: str, student: nn.Module) -> list[Pair]:
    """Layer by layer, each against the teacher's layer whose weights it started from."""
    rename = block_source(kind)
    blocks = itertools.chain(
        ((f"down_blocks.{index}", block) for index, block in enumerate(student.down_blocks)),
        ((f"up_blocks.{index}", block) for index, block in enumerate(student.up_blocks)),
    )
    ours = [
        f"{place}.{layer}.{index}"
        for place, block in blocks
        for layer in ("resnets", "attentions")
        for index in range(len(getattr(block, layer, None) or ()))
    ]
    middle = [("mid_block", "mid_block")] if student.mid_block is not None else []
    return [(rename(name), name) for name in ours] + middle


class Tapped(nn.Module):
    """A UNet that also returns inner activations.

    Forward takes what `UNet2DConditionModel` takes and returns (sample, [activation of every name]). A down block
    gives its hidden state, which is the one after the downsampler.
    """

    def __init__(self, unet: nn.Module, names: Sequence[str] = ()):
        super().__init__()
        self.unet = unet
        self.names = tuple(names)
        self._caught: dict[str, torch.Tensor] | None = None  # only while forward runs
        modules = dict(unet.named_modules())
        for name in self.names:
            if name not in modules:
                raise UserError(f"the UNet has no module {name!r}", "choose another feature set")
            modules[name].register_forward_hook(self._catch(name))

    def _catch(self, name: str):
        def hook(module: nn.Module, inputs, output) -> None:
            if self._caught is None:
                return  # a pipeline that samples calls the UNet without us
            if isinstance(output, tuple):
                output = output[0]
            # A transformer returns an object with one field where its caller asked for one.
            self._caught[name] = output.sample if hasattr(output, "sample") else output

        return hook

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, added=None):
        self._caught = {}
        try:
            out = self.unet(sample, timestep, context, added_cond_kwargs=added, return_dict=False)[0]
            return out, [self._caught[name] for name in self.names]
        finally:
            self._caught = None
