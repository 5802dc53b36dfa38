"""Token ids and a seed in, pixels out: the components of a bundle and the nodes between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from accel.bundle import Bundle
from accel.bundle.graph_file import graph
from accel.bundle.kinds import KINDS
from accel.bundle.shape_profiles import Range, fixed
from accel.bundle.tensor_spec import TensorSpec
from accel.errors import UserError
from accel.pipeline import conditioning
from accel.pipeline.sampling_plan import SamplingPlan

from . import noise
from .merge import Merged
from .nodes import Value, float32, int32, int64
from .sizes import Sizes, within
from .steps import Symbol, check, loop

_ONNX = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_DTYPES = {"int64": TensorProto.INT64, "int32": TensorProto.INT32, "uint8": TensorProto.UINT8}


@dataclass(frozen=True)
class Job:
    """What becomes one graph.

    Attributes:
        plan: how to sample.
        sizes: of the images.
        images: how many at once: a number, or None for any that the bundle admits.
        engine: whose graphs are taken: "onnxruntime" has its own where a component is int8.
    """

    bundle: Bundle
    plan: SamplingPlan
    sizes: Sizes
    images: int | None
    engine: str = ""

    @property
    def encoders(self) -> list[str]:
        return [name for name in KINDS["text_encoder"].names if name in self.bundle.manifest.components]

    @property
    def negative(self) -> bool:
        """Whether the ids of a negative prompt are inputs."""
        return self.plan.guided and not self.bundle.manifest.pipeline["zero_empty_prompt"]

    @property
    def draws(self) -> list[int]:
        """Of the noise: the start, and one after each row that adds some."""
        return [0, *(row + 1 for row in check(self.plan.table, self.plan.sampler).draws)]

    @property
    def rows(self) -> int | str:
        """The first axis of inputs and outputs."""
        return "images" if self.images is None else self.images

    @property
    def inputs(self) -> list[TensorSpec]:
        made = []
        for name in self.encoders:
            length = self.bundle.manifest.components[name].inputs[0].shape[1]
            ids = name.replace("text_encoder", "input_ids")
            for prefix in ("", "negative_")[: 1 + self.negative]:
                made.append(TensorSpec(prefix + ids, "int64", (self.rows, length)))
        return [*made, *self.numbers]

    @property
    def numbers(self) -> list[TensorSpec]:
        """The inputs that are not text."""
        return [TensorSpec("seed", "int32", (self.rows,)), *self.sizes.inputs]

    @property
    def profile(self) -> dict[str, Range]:
        """How many images at once, and their sizes in pixels."""
        batch = self.bundle.manifest.profile.batch if self.images is None else fixed(self.images)
        return {"images": batch, **self.sizes.limits}

    @property
    def quantized(self) -> bool:
        return any(part.int8 for part in self.bundle.manifest.components.values())

    @property
    def output(self) -> TensorSpec:
        return TensorSpec("image", "uint8", (self.rows, *self.sizes.axes, 3))

    def latents(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Shape of one image's latents, for a size in pixels."""
        return self.bundle.manifest.pipeline["latent_channels"], *self.sizes.latent(size)


def compose(job: Job) -> onnx.ModelProto:
    """The graph; its weights are in the files of their components."""
    merged = Merged()
    models = {
        name: graph(job.bundle, job.bundle.component(name), job.engine)
        for name in (*job.encoders, "unet", "vae_decoder")
    }
    x = _sampled(job, merged, models["unet"], _conditioning(job, merged, models))
    _decoded(job, merged, models["vae_decoder"], x)
    name = f"{job.bundle.manifest.source['name']}: prompt to image"
    return merged.model(name, [_info(spec) for spec in job.inputs], [_info(job.output)])


def _info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(spec.name, _DTYPES[spec.dtype], spec.shape)


def _conditioning(job: Job, merged: Merged, models: Mapping[str, onnx.ModelProto]) -> dict[str, str]:
    """What the UNet is given of the prompt: rows without the prompt first, as a pipeline has them."""
    texts = [_encoded(job, merged, models, "", job.bundle.manifest.pipeline.get("clip_skip", 0))]
    if job.negative:
        texts.insert(0, _encoded(job, merged, models, "negative_", 0))
    elif job.plan.guided:
        zero = np.zeros((), job.bundle.component(job.encoders[0]).outputs[0].dtype)
        texts.insert(0, {name: merged.nodes.op("Mul", value, zero) for name, value in texts[0].items()})
    return {name: merged.nodes.op("Concat", *(text[name] for text in texts), axis=0) for name in texts[0]}


def _encoded(
    job: Job, merged: Merged, models: Mapping[str, onnx.ModelProto], prefix: str, clip_skip: int
) -> dict[str, str]:
    hidden, made = [], {}
    for name in job.encoders:
        ids = prefix + name.replace("text_encoder", "input_ids")
        outputs = merged.put(models[name], name, {"input_ids": ids}, prefix.rstrip("_"))
        layers = sum(output.startswith("hidden_states.") for output in outputs)
        hidden.append(outputs[conditioning.hidden_state(layers, clip_skip)])
        if layers and "text_embeds" in outputs:
            made["text_embeds"] = outputs["text_embeds"]
    made["encoder_hidden_states"] = hidden[0] if len(hidden) == 1 else merged.nodes.op("Concat", *hidden, axis=-1)
    return made


def _sampled(job: Job, merged: Merged, model: onnx.ModelProto, feeds: dict[str, str]) -> Symbol:
    """The last latents, float32 [images, C, h, w]."""
    nodes, plan, table = merged.nodes, job.plan, check(job.plan.table, job.plan.sampler)
    record = job.bundle.component("unet")
    specs = {spec.name: spec for spec in record.inputs}
    draws, most = job.draws, int(np.prod(job.latents(job.sizes.largest)))
    if most * len(draws) > noise.MOST_POSITIONS:
        fix = "make smaller images, or take fewer steps"
        raise UserError(f"{len(draws)} draws of {most} numbers of noise are more than 2**24", fix)
    pixels, sides = job.sizes.write(nodes)
    shape = nodes.vector(int64(job.latents(job.sizes.usual)[:1]), *sides)
    seed = "seed"
    if job.sizes.given:
        images = nodes.op("Cast", nodes.op("Shape", seed), to=TensorProto.INT32)
        checked = within(nodes, images, "images", job.profile["images"])
        seed = nodes.op("Add", seed, nodes.op("Sub", checked, images))
    drawn = noise.normal(nodes, seed, draws, nodes.product(shape))
    numbers = nodes.op("Reshape", drawn, nodes.vector(int64([-1, len(draws)]), shape))
    feeds = feeds | _constants(job, merged, specs, feeds["encoder_hidden_states"], pixels)
    feeds = {name: _cast(nodes, value, specs[name].dtype) for name, value in feeds.items()}

    body = Merged("body")
    timesteps = np.array([row.t for row in table.rows], specs["timestep"].dtype)

    def predict(x: Symbol, row: str) -> Symbol:
        own = body.nodes
        sample = x.name if plan.rows == 1 else own.op("Concat", *[x.name] * plan.rows, axis=0)
        inputs = {
            "sample": _cast(own, sample, specs["sample"].dtype),
            "timestep": own.op("Gather", timesteps, row, axis=0),
        }
        outputs = body.put(model, "unet", inputs | feeds)
        out = _cast(own, outputs["out_sample"], "float32", record.outputs[0].dtype)
        if plan.rows == 1:
            return Symbol(own, out)
        parts = f"{out}_without", f"{out}_with"
        own.nodes.append(onnx.helper.make_node("Split", [out], list(parts), name=f"{out}_split", axis=0, num_outputs=2))
        without, shown = (Symbol(own, part) for part in parts)
        return without + (shown - without) * plan.guidance

    def fresh(row: str) -> Symbol:
        at = int64([draws.index(i + 1) if i + 1 in draws else 0 for i in range(len(table.rows))])
        own = body.nodes
        return Symbol(own, own.op("Gather", numbers, own.op("Gather", at, row, axis=0), axis=1))

    first = Symbol(nodes, nodes.op("Gather", numbers, int64(0), axis=1))

    def finished(inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> onnx.GraphProto:
        merged.adopt(body, widened=record.format.endswith("weight-only"))
        return body.graph("step", inputs, outputs)

    states = (job.rows, job.latents(job.sizes.usual)[0], *job.sizes.latent_axes)
    return loop(nodes, body.nodes, table, predict, first, fresh, finished, states)


def _constants(
    job: Job, merged: Merged, specs: Mapping[str, TensorSpec], rows: str, pixels: Sequence[Value]
) -> dict[str, str]:
    """What the UNet is told beside the prompt, for each row of its batch.

    Args:
        rows: a tensor with that many rows.
        pixels: height and width of the images, int32 [1] each.
    """
    nodes = merged.nodes
    made: dict[str, Value] = {}
    if "time_ids" in specs:  # as `conditioning.time_ids` has them for an image that was not cropped
        made["time_ids"] = nodes.op("Cast", nodes.vector(*pixels, int32([0, 0]), *pixels), to=TensorProto.FLOAT)
    if "timestep_cond" in specs:
        width = int(specs["timestep_cond"].shape[-1])
        made["timestep_cond"] = conditioning.guidance_embedding(1, job.plan.guidance, width).astype("float32")
    count = nodes.op("Slice", nodes.op("Shape", rows), int64([0]), int64([1])) if made else ""
    return {
        name: nodes.op("Expand", value, nodes.vector(count, int64([int(specs[name].shape[-1])])))
        for name, value in made.items()
    }


def _cast(nodes, value: str, dtype: str, own: str = "") -> str:
    return value if dtype == own else nodes.op("Cast", value, to=_ONNX[dtype])


def _decoded(job: Job, merged: Merged, model: onnx.ModelProto, x: Symbol) -> None:
    """Latents to the output `image`, by the arithmetic of `accel.pipeline` and `accel.images`."""
    nodes, constants = merged.nodes, job.bundle.manifest.pipeline
    factor, shift = (float32(constants[name]) for name in ("scaling_factor", "shift_factor"))
    factor, shift = (value[:, None, None] if value.ndim else value for value in (factor, shift))
    z = nodes.op("Add", nodes.op("Mul", x.name, float32(1.0 / factor)), shift)
    record = job.bundle.component("vae_decoder")
    z = _cast(nodes, z, record.inputs[0].dtype, "float32")
    pixels = merged.put(model, "vae_decoder", {record.inputs[0].name: z})["sample"]
    pixels = _cast(nodes, pixels, "float32", record.outputs[0].dtype)
    pixels = nodes.op("Transpose", pixels, perm=[0, 2, 3, 1])
    pixels = nodes.op("Add", nodes.op("Mul", pixels, float32(0.5)), float32(0.5))
    pixels = nodes.op("Mul", nodes.op("Clip", pixels, float32(0), float32(1)), float32(255))
    nodes.op("Cast", nodes.op("Round", pixels), name="image", to=TensorProto.UINT8)
