"""Predict the peak memory of a pipeline on an engine, before anything is loaded, and what makes it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...bundle import Bundle, Component
from ...bundle.kinds import KINDS
from ...bundle.shape_profiles import Profile, Range, native_sides
from ...dtypes import SHORT, torch_dtype
from ...engines import facts
from ...errors import UserError
from ...models.weight_files import read_header
from ...pipeline import component_names
from ..variants import Variant
from . import graph

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_STORED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
TILE = 512  # pixels of a tile that is tried, diffusers' own for an SD VAE
# Bytes that an engine takes by itself, for networks of next to no size: thread pools, libraries that load late
# (benchmarks/memory_estimate.py on digits; x86 Linux). On a GPU this is host memory, and CUDA's context is not in it.
ITSELF: Mapping[str, int] = {"eager": 50 << 20, "onnxruntime": 50 << 20, "openvino": 170 << 20}
# Copies of a network's weights while an engine loads it: as in the file, which is mapped, and in its own layout. From
# SD-Tiny at real size (benchmarks/memory-estimate.json; of OpenVINO, benchmarks/sd15-tiny-256.json).
COPIES: Mapping[str, int] = {"onnxruntime": 2, "openvino": 3}
# Options as they are typed.
HALF_TEXT, MODEL, SEQUENTIAL = "--text-encoder-precision fp16", "--offload model", "--offload sequential"
WEIGHT_ONLY = "export with --precision int8-weight-only"


@dataclass(frozen=True)
class Part:
    """One network: bytes of its weights as the engine holds them, of its activations at once in one call, and of its
    largest layer's weights (0 where an engine has no layers)."""

    name: str
    weights: int
    activations: int
    layer: int = 0


@dataclass(frozen=True)
class Need:
    """What a pipeline takes on an engine.

    Attributes:
        engine: the variant, such as "eager:fp16".
        options: what spares memory, as `accel run` takes it: "--offload model", ...
        parts: in the order in which an image needs them.
        resident: whether all weights stay; else those of one network at a time.
        layer: bytes of the largest layer, where one layer's weights are held at a time; else 0.
        itself: bytes that the engine takes by itself, in host memory.
        copies: copies of a network's weights in host memory while it is loaded.
    """

    engine: str
    parts: tuple[Part, ...]
    options: tuple[str, ...] = ()
    resident: bool = True
    layer: int = 0
    itself: int = 0
    copies: int = 1

    @property
    def weights(self) -> int:
        """The most bytes of weights at once."""
        held = [part.weights for part in self.parts]
        return self.layer or (sum(held) if self.resident else max(held))

    @property
    def peak(self) -> int:
        """The most bytes at once: when the images are drawn, or a network is loaded."""
        whole = sum(part.weights for part in self.parts)
        held = [self.layer or (whole if self.resident else p.weights) for p in self.parts]
        drawing = max(w + p.activations for w, p in zip(held, self.parts, strict=True))
        before = [sum(p.weights for p in self.parts[:i]) if self.resident else 0 for i in range(len(self.parts))]
        loading = max(b + self.copies * p.weights for b, p in zip(before, self.parts, strict=True))
        return self.itself + max(drawing, loading if self.copies > 1 else 0)

    def as_dict(self) -> dict[str, Any]:
        parts = {p.name: {"weights_bytes": p.weights, "activations_bytes": p.activations} for p in self.parts}
        return {
            "engine": self.engine,
            "options": list(self.options),
            "weights_bytes": self.weights,
            "peak_bytes": self.peak,
            "components": parts,
        }


@dataclass(frozen=True)
class Call:
    """What an image asks for: images at once, and pixels (None for the model's own)."""

    batch: int = 1
    height: int | None = None
    width: int | None = None
    vae_tile: int | None = None


def need(bundle: Bundle, variant: Variant, call: Call, *, text_encoder_dtype: str = "") -> Need:
    """What a pipeline takes with all of its networks loaded.

    Weights are counted from the header of their file (from the configs, in a pipeline folder), activations from
    shapes. Libraries, CUDA's own context and scratch memory inside kernels are not in it.

    Raises:
        UserError: for sizes that the model does not take, or a pipeline folder on an engine that runs graphs.
    """
    parts = []
    for name in component_names(bundle):
        record = bundle.component(name)
        chosen = variant
        if text_encoder_dtype and name in KINDS["text_encoder"].names and facts(variant.engine).dtypes:
            chosen = replace(variant, dtype=text_encoder_dtype)
        sizes = sizes_of(bundle, record, call)
        parts.append(Part(name, _weights(bundle, record, chosen), *_activations(bundle, record, chosen, sizes)))
    on_gpu = "cuda" in variant.device or facts(variant.engine).engine_files
    if on_gpu:
        return Need(variant.name, tuple(parts))
    known = variant.engine
    return Need(variant.name, tuple(parts), itself=ITSELF.get(known, 0), copies=COPIES.get(known, 1))


def sizes_of(bundle: Bundle, record: Component, call: Call) -> dict[str, int]:
    """Symbolic dimension -> its size in a call, for one component.

    Raises:
        UserError: for a size out of the range that the component takes.
    """
    constants, profile = bundle.manifest.pipeline, bundle.manifest.profile
    own = dict(zip(("height", "width"), native_sides(constants["native_size"]), strict=True))
    sides = {}
    for side in ("height", "width"):
        limits: Range = getattr(profile, side)
        chosen = getattr(call, side) or (own[side] if limits.admits(own[side]) else limits.opt)
        sides[side] = Range(chosen, chosen, chosen)
    one = Profile("call", Range(call.batch, call.batch, call.batch), **sides, tokens=profile.tokens)
    if call.vae_tile:
        one = replace(one, vae_tile=call.vae_tile)
    dims = one.dims(
        vae_scale=constants["vae_scale"],
        latent_multiple=constants["latent_multiple"],
        guidance=float(bundle.manifest.sampler["guidance"]) > 1,
        edits=bundle.manifest.edits,
        component=record.name,
    )
    found = {}
    for name, limits in record.dims.items():
        wanted = dims[name].max if name in dims else limits.opt
        most = (
            wanted if name in ("batch", "images") else limits.max
        )  # more images than one call takes are several calls
        if not limits.min <= wanted <= most:
            raise UserError(
                f"{record.name} takes {name.replace('_', ' ')} {limits}, not {wanted}", "another --height or --width"
            )
        found[name] = min(wanted, limits.max)
    return found


def _weights(bundle: Bundle, record: Component, variant: Variant) -> int:
    cast = _BYTES[SHORT[variant.dtype]] if variant.dtype and not facts(variant.engine).reads_graph else 0
    if not record.weights:
        return record.parameters * (cast or 4)
    _, header = read_header(bundle.file(record.weights))
    total = 0
    for name, entry in (header or {}).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        size, stored = end - begin, _STORED.get(entry["dtype"], 1)
        is_float = entry["dtype"] in ("F32", "F16", "BF16")
        total += size // stored * cast if cast and is_float and variant.dtype != "fp32" else size
    return total


def _activations(bundle: Bundle, record: Component, variant: Variant, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of the activations, and of the largest layer's weights."""
    if facts(variant.engine).reads_graph:
        if not record.graph:
            raise UserError(
                f"{variant.engine} runs ONNX graphs, and {bundle.path} has none", "accel export first; or eager"
            )
        own = variant.engine if variant.engine == "onnxruntime" else ""
        return graph.peak(bundle, record, sizes, own), 0
    import torch

    from ...models.networks import on_meta
    from ...models.pipeline_bundle import PipelineBundle
    from . import module

    dtype = torch_dtype(SHORT[variant.dtype] if variant.dtype and variant.dtype != "fp32" else record.dtype)
    if isinstance(bundle, PipelineBundle):
        network = bundle.on_meta(record.name)
    else:
        network = on_meta(record.kind, bundle.file(f"{record.folder}/config.json"), record.inputs, record.outputs)
    feeds = {
        spec.name: torch.empty(
            spec.concrete(sizes), dtype=dtype if spec.is_activation else torch_dtype(spec.dtype), device="meta"
        )
        for spec in record.inputs
    }
    network = network.to("meta").to(dtype)
    return module.peak(network, feeds), module.largest_layer(network)


def sparing(bundle: Bundle, variant: Variant, call: Call) -> Iterator[Need]:
    """What the pipeline takes, first as it is, then with options that spare memory: each is added to those before it,
    and those that cost the least come first."""
    torchs, given = not facts(variant.engine).reads_graph, ()
    found = need(bundle, variant, call)
    yield found
    if torchs and variant.dtype in ("", "fp32"):
        yield replace(need(bundle, variant, call, text_encoder_dtype="fp16"), options=(HALF_TEXT,))
        variant, given = replace(variant, dtype="fp16"), ("--precision fp16",)
        found = need(bundle, variant, call)
        yield replace(found, engine=variant.engine, options=given)
    if _tiles(bundle, call):
        call, given = replace(call, vae_tile=TILE), (*given, "--vae-tiling")
        found = need(bundle, variant, call)
        yield replace(found, options=given)
    yield replace(found, options=(*given, MODEL), resident=False)
    if variant.engine == "eager":
        yield replace(found, options=(*given, SEQUENTIAL), layer=max(part.layer for part in found.parts))
    if not torchs and not any(bundle.component(part.name).int8 for part in found.parts):
        # A byte for each weight; scales, and the few layers that stay as they are, are about 3 % more.
        parts = [replace(p, weights=round(bundle.component(p.name).parameters * 1.03)) for p in found.parts]
        yield replace(found, parts=tuple(parts), options=(WEIGHT_ONLY, *given, MODEL), resident=False)


def _tiles(bundle: Bundle, call: Call) -> bool:
    """Whether tiles would be smaller than the image, and the decoder takes them: its sides are free."""
    decoder = bundle.manifest.components.get("vae_decoder")
    largest = max(call.height or 0, call.width or 0) or max(native_sides(bundle.manifest.pipeline["native_size"]))
    free = decoder is not None and not any(decoder.dims[d].fixed for d in decoder.dims if d.startswith("latent_"))
    return free and largest > TILE and call.vae_tile is None
