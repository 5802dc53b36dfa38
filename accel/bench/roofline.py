"""Roofline: FLOPs and bytes of a network, and the rates measured on this machine.

No schedule of kernels runs a network faster than its arithmetic at the peak rate, or than reading its weights once at
the memory's rate (the roofline model, Williams et al. 2009). Work is counted from shapes on the meta device, so a
network of any size costs no memory; rates are measured, not quoted. One multiply-add is two FLOPs. Only matrix
arithmetic counts: norms, activations and additions do not run on the units whose rate `measure_peak` takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..dtypes import FLOATS
from ..errors import MissingPackage, UserError
from ..machine import Gpu, Machine, machine

if TYPE_CHECKING:
    import torch

__all__ = [
    "Flops",
    "Gpu",
    "Machine",
    "count_flops",
    "roofline_seconds",
    "machine",
    "measure_bandwidth",
    "measure_peak",
    "weight_bytes",
]

# Side lengths of the square matrices tried: the best one depends on caches and core count.
_CPU_SIZES, _GPU_SIZES = (512, 1024, 2048, 4096), (2048, 4096, 8192)
_WARM_UP_CALLS = 2
_COPY_BYTES = 512 * 2**20  # two such buffers outrun the last-level cache of any single socket


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one forward pass by class: convolutions, matrix times weight, attention's two products, and the rest."""

    conv: int = 0
    linear: int = 0
    attention: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """Sum of the classes."""
        return self.conv + self.linear + self.attention + self.other

    def as_dict(self) -> dict[str, int]:
        """The classes and `total`."""
        return asdict(self) | {"total": self.total}


def count_flops(module: torch.nn.Module, inputs: Sequence[Any] | Mapping[str, Any]) -> Flops:
    """Counts the FLOPs of `module(*inputs)`, or `module(**inputs)` for a mapping, from shapes alone.

    Weights and tensors in `inputs` may be on any device, and are not read: everything runs on the meta device. The
    module is left as it is. Products of two batches count as attention, with or without scaled_dot_product_attention.
    """
    torch = _torch("counting FLOPs")
    from torch.utils.flop_counter import FlopCounterMode

    # Off the meta device attention is one fused operator, which the counter does not know on CPUs; on it, always two
    # batched products.
    weights = {
        name: torch.empty_like(tensor, device="meta")
        for group in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        for name, tensor in group
    }
    to_meta = lambda v: torch.empty_like(v, device="meta") if isinstance(v, torch.Tensor) else v  # noqa: E731
    inputs = torch.utils._pytree.tree_map(to_meta, inputs if isinstance(inputs, Mapping) else tuple(inputs))
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    sums = dict.fromkeys(Flops.__dataclass_fields__, 0)
    counter = FlopCounterMode(display=False)

    class ByFunction(torch.overrides.TorchFunctionMode):
        # The class is that of the function called, not of the operator it ends in: a linear layer may end in a batched
        # product too, depending on strides and on whether gradients are wanted.
        def __torch_function__(self, function, types, args=(), kwargs=None):
            before = counter.get_total_flops()
            result = function(*args, **(kwargs or {}))
            sums[_class(function, args)] += counter.get_total_flops() - before
            return result

    with torch.no_grad(), counter, ByFunction():
        torch.func.functional_call(module, weights, args, kwargs, tie_weights=False)
    sums["other"] += counter.get_total_flops() - sum(sums.values())
    return Flops(**sums)


def _class(function: Callable[..., Any], operands: Sequence[Any]) -> str:
    name = getattr(function, "__name__", "").strip("_")
    if name.startswith("conv"):
        return "conv"
    if name in ("matmul", "rmatmul"):  # of a weight where one side is a plain matrix
        return "linear" if any(getattr(x, "ndim", 3) <= 2 for x in operands[:2]) else "attention"
    if name in ("linear", "bilinear", "mm", "addmm"):
        return "linear"
    if name in ("scaled_dot_product_attention", "bmm", "baddbmm", "einsum", "multi_head_attention_forward"):
        return "attention"
    return "other"


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once: what one forward pass has to read at least."""
    return sum(t.numel() * t.element_size() for group in (module.parameters(), module.buffers()) for t in group)


def roofline_seconds(flops: float, bytes_read: float, *, peak: float, bandwidth: float) -> float:
    """Least time in seconds for that work on a machine of `peak` FLOP/s and `bandwidth` bytes/s (the roofline)."""
    if not (peak > 0 and bandwidth > 0):
        raise UserError(f"invalid rates: peak {peak}, bandwidth {bandwidth} (expected numbers > 0)", "measure them")
    return max(flops / peak, bytes_read / bandwidth)


def measure_peak(dtype: torch.dtype | str = "float32", device: str = "cpu", *, seconds: float = 1.0) -> float:
    """Largest sustained rate of a square matrix product, FLOP/s: the best of several sizes, after warming up.

    It is a rate that the machine gave just now: other programs, clocks and torch's own settings (threads, TF32) are in
    it. `seconds` is shared by the sizes, smallest first. A size that would take over ten times its share at the best
    rate so far is left out: a processor without bfloat16 would need minutes for the largest one.

    Args:
        dtype: torch dtype or its name: float32, bfloat16, float16, or int8, whose products are summed in int32.
    """
    torch = _torch("measuring the peak rate")
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype == torch.int8):
        raise UserError(f"dtype {dtype} has no peak rate here", f"one of: {', '.join(FLOATS)}, int8")
    product, sums = (torch._int_mm, torch.int32) if dtype == torch.int8 else (torch.mm, dtype)
    where, wait = _device(device)
    sizes = _CPU_SIZES if where.type == "cpu" else _GPU_SIZES
    best, share = 0.0, seconds / len(sizes)
    with torch.inference_mode():
        for n in sizes:
            if best and _WARM_UP_CALLS * 2 * n**3 / best > 10 * share:
                break
            a, b = (torch.randn(n, n, device=where).to(dtype) for _ in range(2))
            out = torch.empty(n, n, dtype=sums, device=where)
            calls, elapsed = _repeat(lambda a=a, b=b, out=out: product(a, b, out=out), wait, share)
            best = max(best, 2 * n**3 * calls / elapsed)
    return best


def measure_bandwidth(device: str = "cpu", *, seconds: float = 1.0, size: int = _COPY_BYTES) -> float:
    """Sustained rate of copying memory, bytes/s, reads and writes both counted, after warming up.

    Args:
        size: bytes of each of the two buffers; a cache that holds both makes the result too high.
    """
    torch = _torch("measuring the memory's rate")
    if size < 1:
        raise UserError(f"invalid size: {size} bytes (expected an integer >= 1)", "use a buffer larger than the caches")
    where, wait = _device(device)
    with torch.inference_mode():
        source = torch.ones(size, dtype=torch.uint8, device=where)
        target = torch.empty_like(source)
        calls, elapsed = _repeat(lambda: target.copy_(source), wait, seconds)
    return 2 * size * calls / elapsed


def _repeat(work: Callable[[], Any], wait: Callable[[], None], seconds: float) -> tuple[int, float]:
    """Calls `work` for about `seconds`, in growing batches so that waiting for a GPU is no part of the rate."""
    for _ in range(_WARM_UP_CALLS):
        work()
    wait()
    calls, batch, start = 0, 1, time.perf_counter()
    while True:
        for _ in range(batch):
            work()
        wait()
        calls += batch
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return calls, elapsed
        # Never more than what is left of the time, by the rate so far.
        batch = max(1, min(2 * batch, int(calls / elapsed * (seconds - elapsed))))


def _device(name: str) -> tuple[torch.device, Callable[[], None]]:
    torch = _torch("measuring")
    try:
        where = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}", "use cpu or cuda") from None
    if where.type == "cpu":
        return where, lambda: None
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("no CUDA device is usable here", "use cpu")
        return where, lambda: torch.cuda.synchronize(where)
    raise UserError(f"rates of {where.type} devices are not measured", "use cpu or cuda")


def _torch(feature: str):
    try:
        import torch
    except ImportError:
        raise MissingPackage("torch", feature) from None
    return torch
