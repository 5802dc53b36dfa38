"""How good and how fast the shipped tiny VAE is: PSNR against the full decoder on held-out digits, and its time.

    python benchmarks/tiny_vae.py FOLDER        writes FOLDER/quality.json and prints it
"""

from __future__ import annotations

import argparse
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

import accel
from accel.distill import digits
from accel.distill.tiny_vae import psnr
from accel.export.pipeline import export_pipeline
from accel.files import write_json
from accel.machine import machine
from accel.source import open_source

ENGINES = ("eager", "onnxruntime", "openvino")
ROUNDS = 40


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def quality(folder: Path) -> dict:
    """PSNR in dB on the held-out pictures, all of them as one set."""
    tiny, vae = AutoencoderTiny.from_pretrained(folder).float().eval(), open_source("digits").load("vae")
    pictures, _ = digits.dataset("held-out")
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(64)])
        full = torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in latents.split(64)])
        scaled = latents * vae.config.scaling_factor
        tiny_made = torch.cat([tiny.decode(part).sample.clamp(-1, 1) for part in scaled.split(64)])

    def db(a: torch.Tensor, b: torch.Tensor) -> float:
        return round(float(10 * torch.log10(4 / (a - b).square().mean())), 2)

    return {
        "pictures": len(pictures),
        "psnr_against_full_db": round(psnr(tiny, scaled, full), 2),
        "psnr_against_photo_db": {"full": db(full, pictures), "tiny": db(tiny_made, pictures)},
        "parameters": {"tiny_decoder": parameters(tiny.decoder), "full_decoder": parameters(vae.decoder)},
    }


def milliseconds(folder: Path) -> dict:
    """Median time of decoding one picture of 64 x 64 px, the two decoders taking turns on each engine."""
    with tempfile.TemporaryDirectory() as place:
        bundles = {
            name: export_pipeline(source, Path(place) / name, profile="digits", components=("vae_decoder",))
            for name, source in (("full", open_source("digits")), ("tiny", open_source("digits", vae=folder)))
        }
        z = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
        found = {}
        for engine in ENGINES:
            loaded = {name: accel.load_engine(bundle, "vae_decoder", engine) for name, bundle in bundles.items()}
            times: dict[str, list[float]] = {name: [] for name in loaded}
            for _ in range(ROUNDS + 3):
                for name, decoder in loaded.items():
                    began = time.perf_counter()
                    decoder(latent_sample=z)
                    times[name].append(time.perf_counter() - began)
            found[engine] = {name: round(1000 * float(np.median(taken[3:])), 2) for name, taken in times.items()}
            found[engine]["speedup"] = round(found[engine]["full"] / found[engine]["tiny"], 2)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an AutoencoderTiny of the digits model")
    args = parser.parse_args()
    result = quality(args.folder) | {
        "decode_ms": milliseconds(args.folder), "cpu": machine().cpu, "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "openvino")},
    }  # fmt: skip
    write_json(args.folder / "quality.json", result)
    print(result)
