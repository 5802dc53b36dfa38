"""The measurements of gpu_survey.py: each makes its models with random weights, and returns figures."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HOW = ("eager", "graph", "compile", "max-autotune")
WAYS = (
    "nchw eager",
    "nhwc patched eager",
    "nchw graph",
    "nhwc patched graph",
    "nhwc eager",
    "nchw compile",
    "nhwc patched compile",
    "nhwc patched:int8 graph",
    "nhwc patched:fp8 graph",
    "nhwc max-autotune",
)


@dataclass(frozen=True)
class Sizes:
    """What is measured at which size."""

    matrix: int
    copied: int  # bytes
    seconds: float  # of one timing
    vae: tuple[int, ...]  # sides of images in px
    vae_config: dict[str, Any]
    unets: tuple[tuple[str, dict[str, Any], int, tuple[int, ...]], ...]  # name, config, latent side, batches
    attention: tuple[tuple[str, tuple[int, int, int, int]], ...]  # batch, tokens, heads, width
    norms: tuple[tuple[int, int, int], ...]  # batch, channels, side
    rows: tuple[tuple[int, int], ...]  # tokens, width


@dataclass
class Measures:
    """What can be measured on a device.

    Attributes:
        device: "cuda" or "cpu".
        half: the dtype that stands for half precision there.
    """

    device: str
    sizes: Sizes
    half: str = field(init=False)

    def __post_init__(self) -> None:
        self.half = "float16" if self.device == "cuda" else "bfloat16"

    def machine(self) -> dict[str, Any]:
        import torch

        from accel.machine import machine

        here = machine().as_dict()
        made = {"packages": {k: v for k, v in here["packages"].items() if v}, "cpu": here["cpu"], "gpus": here["gpus"]}
        if self.device == "cuda":
            made |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "clocks": _clocks()}
        return made

    def product(self, dtype: str) -> dict[str, Any]:
        import torch

        from accel.bench.roofline import measure_peak
        from accel.trt.tf32 import float32_in_tf32

        if dtype in ("int8", "fp8"):
            n = self.sizes.matrix
            return {"tflop_per_s": 2 * n**3 / self.time(_products_in_8_bits(torch, n, dtype, self.device)) / 1e12}
        with float32_in_tf32(dtype == "tf32"):
            real = "float32" if dtype == "tf32" else dtype
            return {"tflop_per_s": measure_peak(real, self.device, seconds=self.sizes.seconds * 2) / 1e12}

    def copy(self) -> dict[str, Any]:
        from accel.bench.roofline import measure_bandwidth

        rate = measure_bandwidth(self.device, seconds=self.sizes.seconds, size=self.sizes.copied)
        return {"gb_per_s": rate / 1e9}

    def tf32(self) -> dict[str, Any]:
        """The error of a convolution in float32 with TF32 on and off, against float64."""
        import torch

        from accel.trt.tf32 import float32_in_tf32

        torch.manual_seed(0)
        x, w = torch.randn(1, 64, 32, 32, device=self.device), torch.randn(64, 64, 3, 3, device=self.device)
        exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
        out = {}
        for name in ("ieee", "tf32"):
            with float32_in_tf32(name == "tf32"):
                made = torch.nn.functional.conv2d(x, w, padding=1).double()
            out[f"relative_error_{name}"] = float((made - exact).norm() / exact.norm())
        return out

    def host(self) -> dict[str, Any]:
        """A blocking upload of a number; pixels made on the host, and on the device with one copy."""
        import torch

        from accel.images import to_pil, unit_range

        side = max(self.sizes.vae)
        pixels = torch.rand(1, 3, side, side, device=self.device) * 2 - 1
        pinned = torch.empty(1, side, side, 3, dtype=torch.uint8, pin_memory=self.device == "cuda")

        def on_device() -> None:
            scaled = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            pinned.copy_(scaled, non_blocking=True)
            _wait(self.device)

        return {
            "upload_ms": 1e3 * self.time(lambda: torch.tensor(500, device=self.device)),
            "pixels_on_host_ms": 1e3 * self.time(lambda: to_pil(unit_range(pixels.cpu().numpy()))),
            "pixels_on_device_ms": 1e3 * self.time(on_device),
        }

    def vae(self, side: int, layout: str, kernels: str, how: str) -> dict[str, Any]:
        import torch
        from diffusers import AutoencoderKL

        torch.manual_seed(0)
        model = self.placed(AutoencoderKL(**self.sizes.vae_config), layout)
        z = torch.randn(1, 4, side // 8, side // 8, device=self.device, dtype=next(model.parameters()).dtype)
        return self.timed_call(model, lambda: model.decode(z).sample, kernels, how)

    def unet(self, config: dict[str, Any], side: int, batch: int, way: str) -> dict[str, Any]:
        import torch

        model, call = self.unet_and_call(config, side, batch, "nhwc" if "nhwc" in way else "nchw")
        words = way.split()
        kernels = next((word for word in words if word.startswith("patched")), "torch")
        how = next((word for word in words if word in HOW), "eager")
        flops = None
        if way == WAYS[0]:
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call()
            flops = counter.get_total_flops()
        return self.timed_call(model, call, kernels, how) | ({"flop": flops} if flops else {})

    def unet_and_call(self, config: dict[str, Any], side: int, batch: int, layout: str) -> tuple[Any, Callable]:
        import torch
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        with torch.device(self.device):
            model = UNet2DConditionModel(**config)
        model = self.placed(model, layout)
        like = dict(device=self.device, dtype=next(model.parameters()).dtype)
        x = torch.randn(batch, model.config.in_channels, side, side, **like)
        text = torch.randn(batch, 77, model.config.cross_attention_dim, **like)
        t, added = torch.tensor(500, device=self.device), None
        if model.config.addition_embed_type == "text_time":
            added = dict(text_embeds=torch.randn(batch, 1280, **like), time_ids=torch.zeros(batch, 6, **like))
        return model, lambda: model(x, t, text, added_cond_kwargs=added, return_dict=False)[0]

    def placed(self, model: Any, layout: str) -> Any:
        import torch

        model = model.to(self.device, getattr(torch, self.half)).eval().requires_grad_(False)
        return model.to(memory_format=torch.channels_last) if layout == "nhwc" else model

    def timed_call(self, model: Any, call: Callable, kernels: str, how: str) -> dict[str, Any]:
        """Milliseconds and peak memory of a call, and its distance from the same call on plain eager torch."""
        import torch

        import accel

        with torch.no_grad():
            expected = call().float()
            linear = kernels.partition(":")[2] or None
            patched = accel.patch(model, linear=linear) if kernels.startswith("patched") else nullcontext()
            with patched:
                began, forward = time.perf_counter(), model.forward
                run = call
                if how in ("compile", "max-autotune"):
                    mode = "default" if how == "compile" else "max-autotune-no-cudagraphs"
                    target = model.decoder if hasattr(model, "decoder") else model
                    forward, holder = target.forward, target
                    target.forward = torch.compile(target.forward, mode=mode, backend=self.backend())
                if how == "graph":
                    run = _captured(torch, call, self.device)
                made = run().float()
                first = time.perf_counter() - began
                if self.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                seconds = self.time(run)
                if how in ("compile", "max-autotune"):
                    holder.forward = forward
        error = float((made - expected).norm() / expected.norm())
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else None
        return {"ms": 1e3 * seconds, "first_s": first, "relative_difference": error, "peak_mib": peak}

    def backend(self) -> str:
        return "inductor" if self.device == "cuda" else "aot_eager"

    def attention(self, shape: tuple[int, int, int, int], kernel: str) -> dict[str, Any]:
        import torch

        from accel.attention import check
        from accel.attention.processor import AttentionOn

        check(kernel, device=self.device, half=True)
        torch.manual_seed(0)
        batch, tokens, heads, width = shape
        q, k, v = (torch.randn(batch, tokens, heads, width, device=self.device) for _ in range(3))
        exact = AttentionOn("math").mix(q, k, v)
        half = [value.to(getattr(torch, self.half)) for value in (q, k, v)]
        on = AttentionOn(kernel)
        made, seconds = on.mix(*half), self.time(lambda: on.mix(*half))
        flops = 4 * batch * heads * tokens**2 * width
        error = float((made.float() - exact).norm() / exact.norm())
        return {"ms": 1e3 * seconds, "tflop_per_s": flops / seconds / 1e12, "relative_error": error}

    def norm(self, shape: tuple[int, int, int]) -> dict[str, Any]:
        import torch

        from accel import kernels

        batch, channels, side = shape
        like = dict(device=self.device, dtype=getattr(torch, self.half))
        x = torch.randn(batch, channels, side, side, **like).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.ones(channels, **like), torch.zeros(channels, **like)
        groups, functional = 32 if channels % 32 == 0 else 8, torch.nn.functional
        return self.against(
            lambda: kernels.group_norm_silu(x, weight, bias, groups),
            lambda: functional.silu(functional.group_norm(x, groups, weight, bias)),
            3 * x.nbytes,
        )

    def gate(self, shape: tuple[int, int]) -> dict[str, Any]:
        import torch

        from accel import kernels

        x = torch.randn(shape[0], 8 * shape[1], device=self.device, dtype=getattr(torch, self.half))

        def plain() -> Any:
            value, gate = x.chunk(2, -1)
            return value * torch.nn.functional.gelu(gate)

        return self.against(lambda: kernels.geglu(x), plain, x.nbytes * 3 // 2)

    def rounding(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Rows in int8, and a whole linear layer in eight bits beside torch's in half precision."""
        import torch

        from accel import kernels

        torch.manual_seed(0)
        like = dict(device=self.device, dtype=getattr(torch, self.half))
        x, weight = torch.randn(*shape, **like), torch.randn(4 * shape[1], shape[1], **like)
        out = {"round_ms": 1e3 * self.time(lambda: kernels.quant_rowwise(x))}
        out["linear_half_ms"] = 1e3 * self.time(lambda: torch.nn.functional.linear(x, weight))
        for name, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
            try:
                q, scale = kernels.quant_rowwise(weight, dtype)
                out[f"linear_{name}_ms"] = 1e3 * self.time(partial(kernels.w8a8_linear, x, q, scale))
            except RuntimeError as error:
                out[f"linear_{name}_error"] = described(error)
        return out

    def against(self, ours: Callable, theirs: Callable, moved: int) -> dict[str, Any]:
        """Both times, and our rate of the memory if all moved once."""
        a, b = self.time(ours), self.time(theirs)
        return {"ms": 1e3 * a, "torch_ms": 1e3 * b, "gb_per_s": moved / a / 1e9}

    def training(self, config: dict[str, Any], side: int, way: str) -> dict[str, Any]:
        """A step of training to a target: forward, backward, AdamW."""
        import torch
        from diffusers import UNet2DConditionModel

        import accel

        torch.manual_seed(0)
        with torch.device(self.device):
            model = UNet2DConditionModel(**config).train()
        if "nhwc" in way:
            model = model.to(memory_format=torch.channels_last)
        batch = 4 if self.device == "cuda" else 1
        x = torch.randn(batch, model.config.in_channels, side, side, device=self.device)
        text = torch.randn(batch, 77, model.config.cross_attention_dim, device=self.device)
        t = torch.full((batch,), 500, device=self.device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused="fused" in way)
        if "patched" in way:
            accel.patch(model)
        forward = torch.compile(model, backend=self.backend()) if "compile" in way else model

        def step() -> None:
            with torch.autocast(self.device, torch.bfloat16):
                loss = forward(x, t, text, return_dict=False)[0].float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        began = time.perf_counter()
        step()
        first = time.perf_counter() - began
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = self.time(step)
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else None
        return {"ms": 1e3 * seconds, "images_per_s": batch / seconds, "first_s": first, "peak_mib": peak}

    def time(self, call: Callable) -> float:
        """Median seconds of a call, after a warm-up; events on a GPU, the clock on a CPU."""
        import torch

        for _ in range(2):
            call()
        _wait(self.device)
        samples, began = [], time.perf_counter()
        while len(samples) < 3 or time.perf_counter() - began < self.sizes.seconds and len(samples) < 200:
            if self.device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                samples.append(start.elapsed_time(end) / 1e3)
            else:
                started = time.perf_counter()
                call()
                samples.append(time.perf_counter() - started)
        return sorted(samples)[len(samples) // 2]


def _products_in_8_bits(torch: Any, n: int, dtype: str, device: str) -> Callable:
    if dtype == "int8":
        a, b = (torch.ones(n, n, dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())
    a, b = (torch.ones(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _captured(torch: Any, call: Callable, device: str) -> Callable:
    """A call as one CUDA graph."""
    if device != "cuda":
        raise RuntimeError("CUDA graphs are captured on a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def run() -> Any:
        graph.replay()
        return out

    return run


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _clocks() -> str:
    names = "clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
    done = subprocess.run(["nvidia-smi", f"--query-gpu={names}", "--format=csv"], capture_output=True, text=True)
    return done.stdout.strip()


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
