"""The dtypes of a graph: in which one the weights are stored and computed, and which modules stay float32.

Strongly typed engines (TensorRT 11, and 10 in that mode) have no precision flags, so an fp16 model is an fp16 ONNX
graph. Some modules do not work in fp16; they are chosen here, and the manifest says why.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from accel.bundle.kinds import KINDS
from accel.bundle.tensor_spec import TensorSpec
from accel.dtypes import ALWAYS_FLOAT32, PRECISIONS, QUANTIZED
from accel.errors import UserError, unknown
from accel.models.networks import Network

from . import fp32_fallback
from .fp32_fallback import Peak

# float16 ends at 65,504. Other prompts give larger activations than the scan saw, so a factor of four is left.
FP16_SAFE = 65504.0 / 4


@dataclass(frozen=True)
class DtypePolicy:
    """The dtype of a network, the modules that stay float32 (`fp32_output`: those whose output does too), and why."""

    dtype: str
    float32: tuple[str, ...] = ()
    reason: str = ""
    fp32_output: tuple[str, ...] = ()


def scan(module: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> tuple[list[tuple], dict[str, Peak]]:
    """Run a network in float32 and record the largest magnitude of each inner module's inputs and outputs.

    Returns:
        The outputs of every batch, and {module name: peaks}.
    """
    peaks: dict[str, Peak] = {}

    def note(name: str):
        def hook(_module, args, kwargs, output):
            old = peaks.get(name, Peak())
            inputs = max([old.inputs, *map(_magnitude, (*args, *kwargs.values()))], key=_or_infinity)
            peaks[name] = Peak(inputs, max(old.outputs, _magnitude(output), key=_or_infinity))

        return hook

    handles = [
        part.register_forward_hook(note(name), with_kwargs=True) for name, part in module.named_modules() if name
    ]
    try:
        return run(module, batches), peaks
    finally:
        for handle in handles:
            handle.remove()


def run(module: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[tuple]:
    """The outputs of a network for every batch."""
    with torch.no_grad():
        return [module(**feeds) for feeds in batches]


def _magnitude(value: object) -> float:
    if torch.is_tensor(value) and value.is_floating_point() and value.numel():
        return max((-x.item() if x < 0 else x.item() for x in torch.aminmax(value.detach())), key=_or_infinity)
    return 0.0


def _or_infinity(peak: float) -> float:
    """A magnitude for comparing: NaN counts as the largest."""
    return peak if peak == peak else float("inf")


def check_name(precision: str) -> None:
    if precision not in (*PRECISIONS, *QUANTIZED):
        raise unknown("precision", precision, (*PRECISIONS, *QUANTIZED))


def choose(network: Network, precision: str, peaks: Mapping[str, Peak], *, force_upcast: bool = False) -> DtypePolicy:
    """Decide the dtypes of a network.

    Args:
        precision: fp32 or fp16.
        peaks: what `scan` measured.
        force_upcast: the model's own config asks for float32, as that of SDXL's original VAE does. Then float16 is used
            only if the scan found fp32 fallback blocks; weights that were fixed for float16 come without the flag.
    """
    check_name(precision)
    if precision == "fp32":
        return DtypePolicy("float32")
    if KINDS[network.kind].float32:
        return DtypePolicy("float32", reason="it is small, and its verdict depends on thousandths")
    large = {name: peak.outputs for name, peak in peaks.items() if not peak.outputs < FP16_SAFE}
    reason = ""
    if large:
        name, peak = max(large.items(), key=lambda item: _or_infinity(item[1]))
        reason = f"activations reach {peak:.3g} in {name.removeprefix('model.')}, too close to float16's 65,504"
    if large and network.kind.startswith("vae_"):
        inner = {name.removeprefix("model."): peak for name, peak in peaks.items() if name.startswith("model.")}
        fallback = fp32_fallback.find(network.module.model, inner, FP16_SAFE)
        if fallback:
            return DtypePolicy("float16", fallback.float32, reason, fallback.fp32_output)
    if large:
        return DtypePolicy("float32", reason=reason)
    if force_upcast:
        return DtypePolicy(
            "float32",
            reason="its config asks for float32 (force_upcast); weights fixed for float16 come with it switched off",
        )
    names = {name.removeprefix("model.") for name, _ in network.module.named_modules()}
    kept = tuple(name for name in ALWAYS_FLOAT32 if name in names)
    return DtypePolicy("float16", kept, "the time and size embeddings take no time in float32" if kept else "")


def with_dtype(specs: tuple[TensorSpec, ...], dtype: str) -> tuple[TensorSpec, ...]:
    """The same tensors with floating-point activations in another dtype."""
    return tuple(replace(spec, dtype=dtype) if spec.is_activation else spec for spec in specs)


def save_weights(model: nn.Module, path: Path, chosen: DtypePolicy) -> int:
    """Store the weights of a network in the dtypes of its policy; the model's own tensors are freed on the way.

    Returns:
        Number of parameters.

    Raises:
        UserError: when a weight is NaN or infinite (before or after rounding), naming it.
    """
    parameters = sum(p.numel() for p in model.parameters())
    state = model.state_dict()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)  # `state` is now the only holder, so each original goes as its copy comes
    for name, tensor in state.items():
        fp32 = any(name.startswith(f"{part}.") for part in chosen.float32)
        dtype = torch.float32 if fp32 else getattr(torch, chosen.dtype)
        is_float = tensor.is_floating_point() and tensor.itemsize > 1  # not fp8, which is stored as it is
        stored = tensor.to(dtype if is_float else tensor.dtype).contiguous()
        if is_float and not torch.isfinite(stored).all():
            broken = not torch.isfinite(tensor).all()
            raise UserError(
                f"weight {name} {'is not finite (NaN or infinity)' if broken else f'does not fit {chosen.dtype}'}",
                "the checkpoint is broken: train or download it again" if broken else "--precision fp32",
            )
        state[name] = stored
    try:
        save_file(state, path)
    except SafetensorError as error:  # it hides the errno in its text
        code = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error), str(path)) from None
    return parameters
