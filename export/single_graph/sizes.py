"""The size of a graph's images: constant, or the inputs `height` and `width` within the bundle's profile.

A graph of one size is the default: engines plan its memory and choose its kernels when they load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import TensorProto, helper

from accel.bundle import Manifest
from accel.bundle.shape_profiles import Range, fixed
from accel.bundle.tensor_spec import TensorSpec
from accel.errors import UserError
from accel.pipeline.request import latent_size, side_limits

from .nodes import Nodes, Value, int32, int64

SIDES = ("height", "width")


@dataclass(frozen=True)
class Sizes:
    """The sizes that a graph draws, in pixels.

    Attributes:
        limits: heights and widths, each with the usual one as its optimum.
        scale: pixels per latent pixel.
        given: whether they are inputs; otherwise both are fixed.
    """

    limits: Mapping[str, Range]
    scale: int
    given: bool = False

    @property
    def usual(self) -> tuple[int, int]:
        height, width = (self.limits[side].opt for side in SIDES)
        return height, width

    @property
    def drawn(self) -> list[tuple[int, int]]:
        """Where the graph is compared with the pipeline: the usual size, and one that is not square if there is any."""
        height, width = (self.limits[side] for side in SIDES)
        corners = [(height.min, width.max), (height.max, width.min)]
        return [self.usual, *[corner for corner in corners if corner != self.usual][:1]]

    @property
    def inputs(self) -> list[TensorSpec]:
        return [TensorSpec(side, "int32", (1,)) for side in SIDES] if self.given else []

    @property
    def largest(self) -> tuple[int, int]:
        return self.limits["height"].max, self.limits["width"].max

    @property
    def axes(self) -> tuple[int | str, ...]:
        """Height and width of the output."""
        return SIDES if self.given else self.usual

    @property
    def latent_axes(self) -> tuple[int | str, ...]:
        return tuple(f"latent_{side}" for side in SIDES) if self.given else self.latent(self.usual)

    def latent(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.scale, size[1] // self.scale

    def write(self, nodes: Nodes) -> tuple[list[Value], list[Value]]:
        """Height and width in pixels, int32 [1] each, and in latent pixels, int64 [1] each."""
        if not self.given:
            return [int32([side]) for side in self.usual], [int64([side]) for side in self.latent(self.usual)]
        pixels: list[Value] = [within(nodes, side, side, self.limits[side]) for side in SIDES]
        latent = [nodes.op("Div", side, int32([self.scale])) for side in pixels]
        return pixels, [nodes.op("Cast", side, to=TensorProto.INT64) for side in latent]


def of_bundle(manifest: Manifest, given: bool = False) -> Sizes:
    """The model's own size where its profile has it, else the profile's optimum; with `given`, all of the profile.

    Raises:
        UserError: for inputs where there is nothing to choose.
    """
    scale = manifest.pipeline["vae_scale"]
    usual = dict(zip(SIDES, (side * scale for side in latent_size(manifest, None, None, None)), strict=True))
    if not given:
        return Sizes({side: fixed(usual[side]) for side in SIDES}, scale)
    limits = {side: side_limits(manifest, side) for side in SIDES}
    if all(own.fixed for own in limits.values()):
        raise UserError(
            f"height and width cannot be inputs: this bundle has one size, {usual['height']} x {usual['width']}",
            f"leave --size-input out, or export the model with --profile size={usual['height']}-{2 * usual['height']}",
        )
    found = {side: Range(own.min, usual[side], own.max, own.multiple) for side, own in limits.items()}
    return Sizes(found, scale, given=True)


def within(nodes: Nodes, number: str, name: str, limits: Range) -> str:
    """A number int32 [1] below 2**24, which engines refuse outside its range.

    No operator of ONNX raises an error. Twice the number times two halves is the number; outside the range there are
    three halves, and the error of an engine has the name of the node. (OpenVINO looks at the sizes of a product alone:
    a reshape, a sum or an expansion that does not fit passes there.)
    """
    steps = nodes.op("Mul", nodes.op("Div", number, int32([limits.multiple])), int32([limits.multiple]))
    inside = nodes.op("Equal", number, nodes.op("Clip", steps, int32(limits.min), int32(limits.max)))
    count = nodes.op("Sub", int64([3]), nodes.op("Cast", inside, to=TensorProto.INT64))
    halves = nodes.op("ConstantOfShape", count, value=helper.make_tensor("half", TensorProto.FLOAT, [1], [0.5]))
    twice = nodes.op("Cast", nodes.op("Concat", number, number, axis=0), to=TensorProto.FLOAT)
    product = nodes.op("Unsqueeze", twice, int64([0]))
    product = nodes.op("MatMul", product, halves, name=f"{name} has to be {limits}".replace(" ", "_"))
    return nodes.op("Cast", product, to=TensorProto.INT32)
