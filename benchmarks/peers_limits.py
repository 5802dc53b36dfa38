"""What bounds an image in int8: its multiplications, and the rate at which this processor multiplies int8.

    python benchmarks/peers_limits.py WORK --size 256 --steps 4

The rate is the best of a few stacks of 3 x 3 convolutions on OpenVINO, u8 times s8, warm: oneDNN's kernels, which the
compared libraries run too. Multiplications are counted from shapes, of the networks as they are stored.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

_STACKS, _DEPTH = ((512, 32), (512, 64), (256, 128)), 4  # channels and side; convolutions one after the other


def int8_peak(threads: int, seconds: float = 3.0) -> float:
    """Operations per second, two for each multiply-add."""
    import openvino

    best = 0.0
    for channels, side in _STACKS:
        config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        request = openvino.compile_model(_stack(channels, side), "CPU", config).create_infer_request()
        x = np.random.default_rng(0).standard_normal((1, channels, side, side)).astype(np.float32)
        request.infer([x])
        end, work = time.perf_counter() + seconds / len(_STACKS), _DEPTH * 2 * 9 * channels**2 * side**2
        while time.perf_counter() < end:
            began = time.perf_counter()
            request.infer([x])
            best = max(best, work / (time.perf_counter() - began))
    return best


def _stack(channels: int, side: int):
    import openvino
    from openvino import opset13 as op

    rng = np.random.default_rng(0)
    x = op.parameter([1, channels, side, side], np.float32)
    ends = (np.float32(-4), np.float32(4 - 8 / 256))
    weights = rng.integers(-127, 127, (channels, channels, 3, 3)).astype(np.int8)
    scale = op.constant(np.full((channels, 1, 1, 1), 0.001, np.float32))
    y = op.fake_quantize(x, *ends, *ends, 256)
    for _ in range(_DEPTH):
        y = op.convolution(
            y, op.multiply(op.convert(op.constant(weights), "f32"), scale), [1, 1], [1, 1], [1, 1], [1, 1]
        )
        y = op.fake_quantize(y, *ends, *ends, 256)
    return openvino.Model([y], [x])


def operations(pipeline: Path, size: int, steps: int, batch: int = 1) -> int:
    """Of `batch` images without guidance: text encoder, `steps` times the UNet, decoder."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from accel.bench.roofline import count_flops

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((pipeline / "unet" / "config.json").read_text()))
        vae = AutoencoderKL.from_config(json.loads((pipeline / "vae" / "config.json").read_text()))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(pipeline / "text_encoder"))
        latents = torch.zeros(batch, 4, size // 8, size // 8)
        context = torch.zeros(batch, 77, unet.config.cross_attention_dim)
        tokens = torch.zeros(batch, 77, dtype=torch.long)
    vae.forward = vae.decode
    parts = (
        count_flops(text, (tokens,)).total,
        steps * count_flops(unet, (latents, torch.zeros(batch, device="meta"), context)).total,
        count_flops(vae, (latents,)).total,
    )
    return sum(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    peak, work = int8_peak(args.threads), operations(args.work / "pipeline", args.size, args.steps)
    print(f"{work / 1e9:.0f} billion operations, {peak / 1e12:.2f} trillion a second: {work / peak:.2f} s at least")


if __name__ == "__main__":
    main()
