"""Trace one network to one ONNX graph; its weights stay in the safetensors file beside it.

The graph is traced with `torch.onnx.export(dynamo=True)`. Its initializers keep the state dict's own names, shapes and
bytes, and are stored as ONNX external data that points into `model.safetensors`: one copy of the weights serves torch
and every ONNX engine, files stay small above protobuf's 2 GB limit, and a LoRA or refit finds weights by name.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import optimizer

from accel.bundle.shape_profiles import Range
from accel.bundle.tensor_spec import TensorSpec
from accel.dtypes import torch_dtype
from accel.errors import UserError
from accel.models.networks import Network
from accel.models.weight_files import read_header

GRAPH, WEIGHTS = "model.onnx", "model.safetensors"
# Height and width of the example that is traced, in units: of sides that halve exactly, and of others. No side may be
# one pixel, nor what a UNet halves it to.
_EXACT, _ROUNDED = {"height": 2, "width": 3}, {"height": 18, "width": 22}
# A power of two that no side is a multiple of, see `_sizes_forwarded`.
_NEVER = 60
DEFAULT_OPSET = 20
OPSETS = range(18, 25)


def export_graph(network: Network, dims: Mapping[str, Range], folder: Path, *, opset: int = DEFAULT_OPSET) -> None:
    """Write `folder/model.onnx` for a network whose weights are in `folder/model.safetensors` already.

    Args:
        network: the network, holding the same weights as the file.
        dims: range of every symbolic dimension; a fixed one becomes a constant in the graph.
        opset: ONNX opset, 18 to 24. 20 suits every engine; 23 and up emit GroupNormalization and Attention nodes.

    Raises:
        UserError: for an opset out of range.
    """
    check_opset(opset)
    program = _trace(network, dims, opset)
    model = program.model
    _add_masks(model)
    _simplify(model, set(network.module.state_dict()))
    _name_weights(model, prefix="model.")
    _name_tensors(model, network, dims)
    _point_into(model, folder / WEIGHTS)
    ir.save(model, folder / GRAPH)


def check_opset(opset: int) -> None:
    if opset not in OPSETS:
        raise UserError(f"opset {opset} is not supported", f"choose one of {OPSETS.start} to {OPSETS.stop - 1}")


def vocabulary_of(network: Network) -> int:
    """How many token ids a text encoder knows, or classes a denoiser: 0 to that number, less one."""
    config = network.module.model.config
    return getattr(config, "vocab_size", None) or getattr(config, "num_class_embeds", None) or 1


def example(
    specs: tuple[TensorSpec, ...], sizes: Mapping[str, int], *, seed: int = 0, vocabulary: int = 256
) -> dict[str, torch.Tensor]:
    """Random inputs for given sizes of the symbolic dimensions: N(0, 1) floats, token ids or classes, a timestep.

    Args:
        vocabulary: token ids and classes are below it.
    """
    generator = torch.Generator().manual_seed(seed)
    feeds = {}
    for spec in specs:
        shape, dtype = spec.concrete(sizes), torch_dtype(spec.dtype)
        if spec.name == "timestep":
            feeds[spec.name] = torch.randint(1, 999, shape, generator=generator).to(dtype)
        elif spec.name == "time_ids":
            feeds[spec.name] = torch.randint(0, 1024, shape, generator=generator).to(dtype)
        elif spec.name in ("input_ids", "class_labels"):
            feeds[spec.name] = torch.randint(0, vocabulary, shape, generator=generator).to(dtype)
        else:
            feeds[spec.name] = torch.randn(shape, generator=generator).to(dtype)
    return feeds


def exported_program(network: Network, dims: Mapping[str, Range], device: str = "cpu") -> torch.export.ExportedProgram:
    """A network as torch.export captures it, with every dimension that has a range left free.

    Args:
        dims: range of every symbolic dimension; a fixed one becomes a constant.
        device: where the module is.
    """
    used = {dim for spec in network.inputs for dim in spec.shape if isinstance(dim, str)}
    # torch.export specialises sizes 0 and 1, and merges dimensions that share a size, so the example has neither.
    rounded = _rounded(network, dims)
    sizes = {dim: dims[dim].min if dims[dim].fixed else _tracing_size(dim, dims[dim], rounded) for dim in used}
    feeds = example(network.inputs, sizes, vocabulary=vocabulary_of(network))
    symbols = _symbols(used, dims, rounded)
    shapes = {
        spec.name: {axis: symbols[dim] for axis, dim in enumerate(spec.shape) if dim in symbols} or None
        for spec in network.inputs
    }
    quiet = _quiet("torch.onnx", "torch.export", "onnxscript", "torch.fx")
    with warnings.catch_warnings(), quiet, _sizes_forwarded(network, rounded):
        warnings.simplefilter("ignore")
        return torch.export.export(
            network.module.eval(),
            (),
            {name: value.to(device) for name, value in feeds.items()},
            dynamic_shapes=shapes if symbols else None,
            strict=False,
        )


def _trace(network: Network, dims: Mapping[str, Range], opset: int) -> torch.onnx.ONNXProgram:
    exported = exported_program(network, dims)
    with warnings.catch_warnings(), _quiet("torch.onnx", "torch.export", "onnxscript", "torch.fx"):
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=opset,
            input_names=[spec.name for spec in network.inputs],
            output_names=[spec.name for spec in network.outputs],
            optimize=False,
            verbose=False,
        )


def _rounded(network: Network, dims: Mapping[str, Range]) -> bool:
    """Whether the sides of a network go in steps that it does not halve exactly."""
    factor = 2 ** getattr(network.module.model, "num_upsamplers", 0)
    sides = [limits for dim, limits in dims.items() if dim in ("latent_height", "latent_width") and not limits.fixed]
    return any(limits.multiple % factor or limits.multiple == 1 for limits in sides)


@contextmanager
def _sizes_forwarded(network: Network, rounded: bool) -> Iterator[None]:
    """Let a UNet go back up to the very sizes that it came down from, for all sides of a range.

    diffusers' `forward` decides that by whether a side is a multiple of 2 ** `num_upsamplers`, which is for one side or
    the other and would be burnt into the graph. Going up to twice a side is the same either way.
    """
    model = network.module.model
    own = getattr(model, "num_upsamplers", None)
    if not rounded or own is None:
        yield
        return
    model.num_upsamplers = _NEVER
    try:
        yield
    finally:
        model.num_upsamplers = own


def _tracing_size(dim: str, limits: Range, rounded: bool) -> int:
    if dim in ("batch", "images"):
        return max(2, limits.min)
    side = next((side for side in _EXACT if side in dim), None)
    units = 3 if side is None else (_ROUNDED if rounded else _EXACT)[side]
    return max(units * limits.multiple, limits.min)


def _symbols(used: set[str], dims: Mapping[str, Range], rounded: bool) -> dict[str, object]:
    """torch.export dimensions: sides are multiples of one unit, so that halving and doubling stay exact."""
    symbols: dict[str, object] = {}
    for dim in sorted(used):
        if dims[dim].fixed:
            continue
        base, _, stride = dim.rpartition("_")
        root = base if stride.isdigit() else dim
        root = f"latent_{dim}" if f"latent_{dim}" in used else root  # an image beside its latents
        unit = dims[root].multiple
        # The range must let the example pass, and no side of a UNet become one pixel: only the trace asks for that.
        of_side = rounded and any(side in root for side in _EXACT)
        least, most = (9, _ROUNDED["width"]) if of_side else (1, _EXACT["width"])
        symbol = torch.export.Dim(f"{root}_unit", min=-(-least // unit), max=max(most, dims[root].max // unit))
        multiple = dims[dim].multiple
        symbols[dim] = symbol if multiple == 1 else multiple * symbol
    return symbols


def _add_masks(model: ir.Model) -> None:
    """Convert boolean attention masks to numbers that are added to the scores, the only masks that TensorRT supports.

    A masked position gets the dtype's lowest finite number, as in transformers' own masks: zero after the softmax, and
    no infinity enters the graph.
    """
    made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(model.graph):
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        if mask is None or mask.dtype != ir.DataType.BOOL:
            continue
        dtype = node.inputs[0].dtype
        if (mask, dtype) not in made:
            lowest = torch.finfo(getattr(torch, dtype.name.lower())).min
            shown, hidden = (ir.node("Constant", [], {"value": ir.tensor(x, dtype)}) for x in (0.0, lowest))
            chosen = ir.node("Where", [mask, shown.outputs[0], hidden.outputs[0]])
            model.graph.insert_before(node, [shown, hidden, chosen])
            made[mask, dtype] = chosen.outputs[0]
        node.replace_input_with(3, made[mask, dtype])


def _simplify(model: ir.Model, weights: set[str]) -> None:
    """Fold shape arithmetic, merge common subexpressions, drop unused nodes and stack traces; never change a weight."""

    def may_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    optimizer.fold_constants(
        model, onnx_shape_inference=True, input_size_limit=8192, output_size_limit=512 * 512, should_fold=may_fold
    )
    for transform in (
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.LiftConstantsToInitializersPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        transform(model)


def _name_weights(model: ir.Model, prefix: str) -> None:
    """Give initializers the names of the inner model's state dict (without the wrapper's prefix)."""
    for name in [name for name in model.graph.initializers if name.startswith(prefix)]:
        value = model.graph.initializers.pop(name)
        value.name = name.removeprefix(prefix)
        if value.const_value is not None:
            value.const_value.name = value.name
        model.graph.initializers[value.name] = value


def _name_tensors(model: ir.Model, network: Network, dims: Mapping[str, Range]) -> None:
    """Write our dimension names into the graph's inputs and outputs; engines infer the inner shapes."""
    for values, specs in ((model.graph.inputs, network.inputs), (model.graph.outputs, network.outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        for value, spec in zip(values, specs, strict=True):
            value.shape = ir.Shape([dims[d].min if isinstance(d, str) and dims[d].fixed else d for d in spec.shape])
            value.metadata_props.clear()  # torch.export's own notes; what the passes clear is the nodes'
    borders = {id(value) for value in [*model.graph.inputs, *model.graph.outputs]}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if id(value) not in borders:
                value.shape, value.type = None, None


def _point_into(model: ir.Model, weights: Path) -> None:
    """Turn every initializer that is stored in the safetensors file into external data at its offset there."""
    header, start = safetensors_header(weights)
    for name, value in model.graph.initializers.items():
        if name not in header:
            continue
        entry, tensor = header[name], value.const_value
        begin, end = entry["data_offsets"]
        assert list(tensor.shape) == entry["shape"] and tensor.nbytes == end - begin, f"{name} differs from the file"
        dtype, shape = tensor.dtype, tensor.shape
        if any("block_size" in node.attributes for node in value.consumers()) and dtype == ir.DataType.UINT8:
            # torch has no int4: the bytes are pairs of it, in ONNX's own order (`accel.int8.rounding.quantized`).
            dtype, shape = ir.DataType.INT4, ir.Shape([*shape[:-1], 2 * shape[-1]])
            value.dtype, value.shape = dtype, shape
        value.const_value = ir.ExternalTensor(
            weights.name, start + begin, end - begin, dtype, shape=shape, name=name, base_dir=weights.parent
        )


def safetensors_header(path: Path) -> tuple[dict[str, dict], int]:
    """The tensors in the header of a safetensors file that is whole, and the byte at which its data starts."""
    length, header = read_header(path)
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + length


class _quiet:
    """Silence the exporters' progress and warnings; their errors are exceptions."""

    def __init__(self, *loggers: str):
        self.loggers = [logging.getLogger(name) for name in loggers]

    def __enter__(self) -> None:
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)
