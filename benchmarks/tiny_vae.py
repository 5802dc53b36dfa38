"""How good and how fast a tiny VAE of the digits model is: PSNR against the full decoder on held-out digits, and time.

    python benchmarks/tiny_vae.py FOLDER        writes FOLDER/quality.json and FOLDER/README.md

The two decoders take turns on one thread. What counts is the processor time of the fastest round: what else the machine
does hardly shows in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

import accel
from accel.distill.methods.tiny_vae import psnr
from accel.distill.sources import digits
from accel.export.pipeline import export_pipeline
from accel.files import write_json
from accel.machine import machine
from accel.models.source import open_source

ENGINES = {"eager": {}, "onnxruntime": {"threads": 1}, "openvino": {"threads": 1}}
ROUNDS = 100


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def quality(folder: Path) -> dict:
    """PSNR in dB on the held-out images, all of them as one set."""
    tiny, vae = AutoencoderTiny.from_pretrained(folder).float().eval(), open_source("digits").load("vae")
    images, _ = digits.dataset("held-out")
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
        full = torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in latents.split(64)])
        scaled = latents * vae.config.scaling_factor
        tiny_made = torch.cat([tiny.decode(part).sample.clamp(-1, 1) for part in scaled.split(64)])

    def db(a: torch.Tensor, b: torch.Tensor) -> float:
        return round(float(10 * torch.log10(4 / (a - b).square().mean())), 2)

    return {
        "pictures": len(images),
        "psnr_against_full_db": round(psnr(tiny, scaled, full), 2),
        "psnr_against_photo_db": {"full": db(full, images), "tiny": db(tiny_made, images)},
        "parameters": {"tiny_decoder": parameters(tiny.decoder), "full_decoder": parameters(vae.decoder)},
    }


def milliseconds(folder: Path) -> dict:
    """Least processor time of decoding one image of 64 x 64 px on one thread, in ms, by engine and decoder."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        bundles = {
            name: export_pipeline(source, Path(place) / name, profile="digits", components=("vae_decoder",))
            for name, source in (("full", open_source("digits")), ("tiny", open_source("digits", vae=folder)))
        }
        z = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
        found = {}
        for engine, options in ENGINES.items():
            loaded = {
                name: accel.load_engine(bundle, "vae_decoder", engine, **options) for name, bundle in bundles.items()
            }
            times: dict[str, list[float]] = {name: [] for name in loaded}
            for _ in range(ROUNDS):
                for name, decoder in loaded.items():
                    began = time.process_time()
                    decoder(latent_sample=z)
                    times[name].append(time.process_time() - began)
            found[engine] = {name: round(1000 * min(taken), 2) for name, taken in times.items()}
            found[engine]["speedup"] = round(found[engine]["full"] / found[engine]["tiny"], 2)
    return found


def card(name: str, result: dict, record: dict) -> str:
    """README.md of the folder, from its figures and its training record."""
    psnr_of, count = result["psnr_against_photo_db"], result["parameters"]
    hours = record["steps"] * record["seconds_per_step"] / 3600
    rows = "\n".join(
        f"| {engine} | {times['full']} | {times['tiny']} | {times['speedup']}x |"
        for engine, times in result["decode_cpu_ms"].items()
    )
    return f"""---
library_name: diffusers
---

# Digits {name}

The network of TAESD (diffusers' `AutoencoderTiny`), distilled from the digits teacher's VAE: it decodes the same
latents in a fraction of the time, and encodes images into them.

```
accel export digits OUT --vae digits/{name}
```

```python
from diffusers import AutoencoderTiny, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("teacher", vae=AutoencoderTiny.from_pretrained("{name}"))
```

## Training

`accel distill vae --recipe digits_vae --out OUT`: {record["steps"]} steps of {record["recipe"]["batch"]}, \
{hours:.1f} hours on {record["threads"]} CPU thread of a busy machine.
`training.json` has every setting.

## Figures

{result["images"]} held-out images, as one set.

| | full | tiny |
|---|---|---|
| PSNR of the decoded image against the photo | {psnr_of["full"]:.1f} dB | {psnr_of["tiny"]:.1f} dB |
| parameters of the decoder | {count["full_decoder"]:,} | {count["tiny_decoder"]:,} |

The tiny decoder's images are {result["psnr_against_full_db"]} dB from the full one's.

Processor time of decoding one image of 64 x 64 px on one thread ({result["cpu"]}), the fastest of {result["rounds"]}
rounds in turns:

| engine | full ms | tiny ms | |
|---|---|---|---|
{rows}

Data, licence of the data and limits are the teacher's.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an AutoencoderTiny of the digits model")
    args = parser.parse_args()
    result = quality(args.folder) | {
        "decode_cpu_ms": milliseconds(args.folder),
        "cpu": machine().cpu,
        "threads": 1,
        "rounds": ROUNDS,
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "openvino")},
    }
    write_json(args.folder / "quality.json", result)
    record = json.loads((args.folder / "training.json").read_text())
    (args.folder / "README.md").write_text(card(args.folder.resolve().name, result, record))
    print(json.dumps(result, indent=2))
