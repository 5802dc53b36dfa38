"""A network as OpenVINO IR, by optimum-intel or for GenAI, with the inputs that our pipeline passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import MissingPackage, UserError
from .specs import Network, Tensor

GRAPH, WEIGHTS = "openvino_model.xml", "openvino_model.bin"
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32"}


def take(source: Path, out: Path) -> Network:
    """Write the IR of `source` into `out`; its timestep becomes a float scalar, as ours is.

    Raises:
        UserError: for IR that OpenVINO does not read, or where OpenVINO is not installed.
    """
    try:
        import openvino  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise MissingPackage("openvino", "OpenVINO IR", "openvino") from None
    try:
        model = openvino.Core().read_model(source / GRAPH)
    except Exception as error:
        line = str(error).strip().splitlines()[-1][:200]
        raise UserError(f"OpenVINO cannot read {source / GRAPH}: {line}", "get the folder again") from None
    _scalar_timestep(model)
    openvino.save_model(model, out / GRAPH, compress_to_fp16=False)
    inputs, outputs = ([_tensor(port) for port in side] for side in (model.inputs, model.outputs))
    return Network(GRAPH, WEIGHTS, inputs, outputs, _parameters(model))


def _parameters(model: Any) -> int:
    """Numbers in constants of some size: weights, and not shapes."""
    shapes = [tuple(op.shape) for op in model.get_ops() if op.get_type_name() == "Constant"]
    return sum(math.prod(shape) for shape in shapes if math.prod(shape) > 256)


def _scalar_timestep(model: Any) -> None:
    from openvino import PartialShape, Type, opset13

    given = next((node for node in model.get_parameters() if "timestep" in node.output(0).get_names()), None)
    if given is None:
        return
    kind, rank = given.get_element_type(), given.get_partial_shape().rank.get_length()
    if kind.is_real() and not rank:
        return
    readers = given.output(0).get_target_inputs()
    given.set_element_type(Type.f32)
    given.set_partial_shape(PartialShape([]))
    inner = opset13.convert(given, kind.get_type_name())
    shaped = opset13.reshape(inner, opset13.constant(np.ones(rank, np.int64)), False) if rank else inner
    for reader in readers:
        reader.replace_source_output(shaped.output(0))
    model.validate_nodes_and_infer_types()


def _tensor(port: Any) -> Tensor:
    kind = port.get_element_type().get_type_name()
    if kind not in _DTYPES:
        raise UserError(f"{port.get_any_name()!r:.80} is of OpenVINO type {kind}", "export the model with accel")
    shape = tuple(dim.get_length() if dim.is_static else None for dim in port.get_partial_shape())
    return Tensor(_name(port), _DTYPES[kind], shape)


def _name(port: Any) -> str:
    """The name of optimum's that a tensor has among its names."""
    names = sorted(port.get_names())
    return next((name for name in names if "/" not in name and ":" not in name and not name.isdigit()), names[0])
