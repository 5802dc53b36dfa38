"""On a GPU, int8 in plain torch against float16: is there anything to win without TensorRT?

    python benchmarks/torch_w8a8.py --json benchmarks/torch-w8a8.json          # needs a CUDA device
    python benchmarks/torch_w8a8.py --device cpu --narrow --rounds 2           # tries the arithmetic, not the speed

The SD-Tiny UNet at real size with random weights, 512 px. Linear layers are products of int8 by int8 into int32
(`torch._int_mm`, cuBLASLt); torch has no integer convolution, so convolutions become the same products of their
patches. Each is measured eager and compiled, taking turns with float16, and its output is compared with fake
quantization's. What is printed is what was measured: this script has never been run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from accel.int8 import fake_quant
from accel.int8.config import Int8Config
from accel.int8.observers import observe
from accel.machine import machine
from accel.models.topology import narrowed, topology
from accel.parity import relative_l2

# cuBLASLt's integer products take more than 16 rows, and sides that are multiples of 8.
LEAST_ROWS, SIDE = 17, 8


class W8A8(nn.Module):
    """A product of int8 activations and int8 weights, both symmetric, into int32.

    Args:
        layer: fake-quantized, with its ranges.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        weight = layer.weight.detach()
        scale = fake_quant.weight_scale(weight)
        flat = (weight.float() / fake_quant.along(scale, weight)).round().flatten(1).to(torch.int8)
        self.register_buffer("weight", flat.contiguous())  # [out, in]
        self.register_buffer("step", layer.input_range.scale.detach().clone())
        self.register_buffer("out_step", scale * self.step)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def product(self, q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[rows, in] int8 to [rows, out] in dtype."""
        y = torch._int_mm(q, self.weight.t()).float() * self.out_step
        return (y if self.bias is None else y + self.bias).to(dtype)

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp((x.float() / self.step).round(), -128, 127).to(torch.int8)


class W8A8Linear(W8A8):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(self.quantized(x).flatten(0, -2), x.dtype)
        return y.view(*x.shape[:-1], -1)


class W8A8Conv2d(W8A8):
    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer)
        self.kernel, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        assert layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (kh, kw), (sh, sw), (ph, pw) = self.kernel, self.stride, self.padding
        q = F.pad(self.quantized(x), (pw, pw, ph, ph)).unfold(2, kh, sh).unfold(3, kw, sw)  # [b, c, h, w, kh, kw]
        b, _, h, w = q.shape[:4]
        y = self.product(q.permute(0, 2, 3, 1, 4, 5).reshape(b * h * w, -1), x.dtype)
        return y.view(b, h, w, -1).permute(0, 3, 1, 2)


def replace_layers(unet: nn.Module, feeds: tuple) -> tuple[int, int]:
    """Put integer products in place of the calibrated layers. Returns how many, and how many stay (too small)."""
    rows: dict[str, int] = {}

    def note(name: str) -> Callable:
        def see(_module: nn.Module, args: tuple, y: torch.Tensor) -> None:
            rows[name] = y.numel() // (y.shape[1] if y.dim() == 4 else y.shape[-1])

        return see

    layers = dict(fake_quant.fake_layers(unet))
    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    with torch.no_grad():
        unet(*feeds)
    for handle in handles:
        handle.remove()
    made = {}
    for name, layer in layers.items():
        flat = layer.weight.flatten(1)
        if rows[name] >= LEAST_ROWS and not flat.shape[0] % SIDE and not flat.shape[1] % SIDE:
            made[name] = (W8A8Conv2d if isinstance(layer, nn.Conv2d) else W8A8Linear)(layer)
    fake_quant.detach(unet)
    for name, layer in made.items():
        parent, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(parent), leaf, layer)
    return len(made), len(layers) - len(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--narrow", action="store_true", help="a network of toy size")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
    config = narrowed("sd15-tiny", (32, 64, 64)) if args.narrow else topology("sd15-tiny").config
    cells = 16 if args.narrow else 64

    def build() -> nn.Module:
        torch.manual_seed(0)
        return UNet2DConditionModel(**config).eval().to(args.device, dtype).requires_grad_(False)

    def sync() -> None:
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()

    feeds = (torch.randn(args.batch, 4, cells, cells), torch.tensor(499.0), torch.randn(args.batch, 77, 768))
    feeds = tuple(value.to(args.device, dtype) for value in feeds)
    config = Int8Config(exclude_bos=False, outputs=False, observer="max")  # as the usual W8A8 in torch
    plain, low = build(), build()
    fake_quant.attach(low, config)
    observe([low], config, lambda: low(*feeds))
    with torch.inference_mode():
        truth, fake = plain(*feeds)[0].float(), low(*feeds)[0].float()
    count, kept = replace_layers(low, feeds)
    name = str(dtype).removeprefix("torch.")
    ways: dict[str, Callable[[], Any]] = {f"{name} eager": lambda: plain(*feeds), "W8A8 eager": lambda: low(*feeds)}
    if args.device.startswith("cuda"):
        compiled = {kind: torch.compile(model, mode="max-autotune") for kind, model in ((name, plain), ("W8A8", low))}
        ways |= {f"{kind} compiled": lambda model=model: model(*feeds) for kind, model in compiled.items()}
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        made = low(*feeds)[0].float()
        for run in list(ways.values()) * 3:
            run()
        for _ in range(args.rounds):
            for way, run in ways.items():
                sync()
                started = time.perf_counter()
                run()
                sync()
                times[way].append(time.perf_counter() - started)
    distance = lambda x: relative_l2(x.cpu().numpy(), truth.cpu().numpy())  # noqa: E731
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else "none"
    found = {
        "machine": machine().as_dict(),
        "gpu": gpu,
        "batch": args.batch,
        "layers": {"int8": count, name: kept},
        "distance": {"fake quantization": distance(fake), "W8A8": distance(made)},
        "milliseconds": {way: 1e3 * statistics.median(values) for way, values in times.items()},
    }
    print(json.dumps({key: value for key, value in found.items() if key != "machine"}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
