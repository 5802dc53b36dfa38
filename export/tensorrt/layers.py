"""The layers of a built engine, in one form, however TensorRT tells them.

The engine inspector tells them as JSON, but needs the engine deserialized, and so a GPU. The builder tells the same as
lines of its verbose log, on any machine, when the profiling verbosity is detailed:

    Name: node_conv2d_myl0_2, LayerType: correlation, Inputs: [ { Name: ..., Dimensions: [-1,4,16,16], ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_HEADING = "Layers:"
_FIELDS = ("LayerType", "Inputs", "Constants", "Outputs", "TacticName", "StreamId", "Metadata")
_SPLIT = re.compile(r", (" + "|".join(_FIELDS) + "): ?")
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([^\]]*)\].*?Datatype: (.*?)(?:, Format: .*?)? *\}")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_NUMBER = re.compile(r"^Total Activation Memory: (\d+) bytes", re.MULTILINE)


@dataclass(frozen=True)
class Tensor:
    """An operand of a layer: its datatype as TensorRT spells it ("Half", "Channel major FP16 format"), its shape.

    Attributes:
        name: TensorRT's; the input of one layer has the name of another's output.
    """

    datatype: str
    shape: tuple[int, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Layer:
    """A layer of an engine.

    Attributes:
        kind: TensorRT's LayerType: correlation, gemm, kgen, CaskConvolution, ...
        constants: its weights and biases; the inspector of TensorRT 10 does not tell them.
        nodes: names of the ONNX nodes that it was made of.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...] = ()
    constants: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    tactic: str = ""
    nodes: tuple[str, ...] = ()


def from_inspector(information: str) -> list[Layer]:
    """The layers of `EngineInspector.get_engine_information` in JSON; none where it tells no more than their names."""
    try:
        layers = json.loads(information).get("Layers", [])
    except (ValueError, AttributeError):
        return []
    return [_layer(layer) for layer in layers if isinstance(layer, Mapping)]


def _layer(found: Mapping[str, Any]) -> Layer:
    def tensors(key: str) -> tuple[Tensor, ...]:
        values = found.get(key)
        return tuple(_tensor(v) for v in values if isinstance(v, Mapping)) if isinstance(values, list) else ()

    return Layer(
        name=str(found.get("Name", "")),
        kind=str(found.get("LayerType", "")),
        inputs=tensors("Inputs"),
        constants=tensors("Constants"),
        outputs=tensors("Outputs"),
        tactic=str(found.get("TacticName", "")),
        nodes=tuple(_NODE.findall(str(found.get("Metadata", "")))),
    )


def _tensor(found: Mapping[str, Any]) -> Tensor:
    """TensorRT 10 has `Format/Datatype` in one, 11 and RTX have a `Datatype` beside a `Format`."""
    dims = found.get("Dimensions")
    shape = tuple(d for d in dims if isinstance(d, int)) if isinstance(dims, list) else ()
    return Tensor(str(found.get("Datatype") or found.get("Format/Datatype") or ""), shape, str(found.get("Name", "")))


def from_log(messages: Iterable[str]) -> list[Layer]:
    """The layers in a builder's verbose log; those of the last listing, where there are several."""
    listing = ""
    for message in messages:
        text = message.removeprefix("VERBOSE ")
        if text.startswith(_HEADING):
            listing = text
    return [_parsed(line) for line in listing.splitlines() if line.startswith("Name: ") and ", LayerType: " in line]


def _parsed(line: str) -> Layer:
    parts = _SPLIT.split(line)
    found = dict(zip(parts[1::2], parts[2::2], strict=False))

    def tensors(key: str) -> tuple[Tensor, ...]:
        return tuple(
            Tensor(kind, tuple(int(d) for d in dims.split(",") if d.lstrip("-").isdigit()), name)
            for name, dims, kind in _TENSOR.findall(found.get(key, ""))
        )

    return Layer(
        name=parts[0].removeprefix("Name: "),
        kind=found.get("LayerType", ""),
        inputs=tensors("Inputs"),
        constants=tensors("Constants"),
        outputs=tensors("Outputs"),
        tactic=found.get("TacticName", ""),
        nodes=tuple(_NODE.findall(found.get("Metadata", ""))),
    )


def activation_memory(messages: Iterable[str]) -> int | None:
    """Bytes of activations of the engine, as the builder's log tells them; None where it does not."""
    found = [int(match[1]) for message in messages if (match := _NUMBER.search(message))]
    return found[-1] if found else None
