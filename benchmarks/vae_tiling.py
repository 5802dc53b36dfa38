"""Peak memory of decoding an image whole and in tiles, with Stable Diffusion's VAE at real size and random weights.

    python benchmarks/vae_tiling.py out/vae-tiling --write

The decoder has the published config (49.5 million parameters, float32). Each row is a process of its own that loads the
decoder, decodes 64 px, so that all weights are in memory, and then one image through `accel.pipeline.tiling` as a
pipeline does. Kept is the peak of resident memory (VmHWM, reset before) above that of the loaded engine; Linux
only. Rows stay in the out folder: a run that was interrupted goes on. `--write` makes benchmarks/vae-tiling.json and
the table of docs/python.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pages

import accel
from accel.engines.base import to_numpy
from accel.export.pipeline import export_pipeline
from accel.files import read_json, write_json
from accel.machine import machine
from accel.pipeline.tiling import VaeTiling

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/vae-tiling.json", ROOT / "docs/python.md"
ENGINES = ("eager", "onnxruntime")
# Side of the image, and of a tile; 0 for a whole image. 512 is what diffusers takes for this VAE.
ROWS = ((512, 0), (512, 256), (1024, 0), (1024, 512))
SCALE, FACTOR = 8, 0.18215


def decoder(out: Path) -> Path:
    """A bundle of the VAE decoder alone, for 8 to 1024 px."""
    bundle = out / "bundle"
    if not bundle.exists():
        from random_pipeline import write

        source = out / "pipeline"
        if not (source / "model_index.json").is_file():
            write("sd15-tiny", source)
        export_pipeline(source, bundle, profile="batch=1,size=1024,vae_tile=1024", components=("vae_decoder",))
    return bundle


def resident(field: str) -> float:
    """Resident memory of this process in MiB: VmRSS now, VmHWM at most since the peak was reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(bundle: Path, engine: str, size: int, tile: int) -> dict[str, Any]:
    """Decode one image in this process."""
    latents = np.random.default_rng(0).normal(size=(1, 4, size // SCALE, size // SCALE)).astype(np.float32) / FACTOR
    vae = accel.load_engine(bundle, "vae_decoder", engine, threads=1) if engine != "eager" else _eager(bundle)
    vae(latent_sample=vae.array(latents[:, :, :8, :8].copy()))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    loaded = resident("VmRSS")
    seen: list[int] = []

    def run(z: np.ndarray) -> np.ndarray:
        seen.append(z.shape[2] * SCALE)
        return to_numpy(vae(latent_sample=vae.array(z))["sample"])

    if tile:
        config = read_json(bundle / "vae_decoder/config.json", "the VAE's config")
        pixels = VaeTiling.of(config, SCALE, tile).decode(latents, run)
    else:
        pixels = run(latents)
    assert pixels.shape == (1, 3, size, size) and np.isfinite(pixels).all()
    return dict(engine=engine, size=size, tile=tile, tiles=len(seen), loaded_mib=loaded, peak_mib=resident("VmHWM"))


def _eager(bundle: Path) -> Any:
    import torch

    torch.set_num_threads(1)
    return accel.load_engine(bundle, "vae_decoder", "eager")


def rows(out: Path) -> list[dict[str, Any]]:
    decoder(out)
    kept = out / "rows.json"
    found: dict[str, dict[str, Any]] = read_json(kept, "the rows") if kept.is_file() else {}
    for engine in ENGINES:
        for size, tile in ROWS:
            key = f"{engine}-{size}-{tile}"
            if key not in found:
                command = [sys.executable, __file__, str(out), "--row", engine, str(size), str(tile)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{key} failed:\n{done.stderr[-2000:]}")
                found[key] = json.loads(done.stdout.splitlines()[-1])
                write_json(kept, found)
                print(f"{key}: {found[key]['peak_mib'] - found[key]['loaded_mib']:,.0f} MiB above the loaded engine")
    return [found[f"{engine}-{size}-{tile}"] for engine in ENGINES for size, tile in ROWS]


def table(found: list[dict[str, Any]]) -> str:
    """Rows of size and tile, MiB above the loaded engine."""
    cells = {(row["engine"], row["size"], row["tile"]): row for row in found}
    lines = [f"| image | tiles | {' | '.join(ENGINES)} |", "|---|---|" + "---|" * len(ENGINES)]
    for size, tile in ROWS:
        each = [cells[engine, size, tile] for engine in ENGINES]
        how = f"{each[0]['tiles']} of {tile} px and less" if tile else "whole"
        figures = " | ".join(f"{row['peak_mib'] - row['loaded_mib']:,.0f} MiB" for row in each)
        lines.append(f"| {size} px | {how} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the pipeline, the bundle and the rows")
    parser.add_argument("--write", action="store_true", help="write the result and the table of the page")
    parser.add_argument("--row", nargs=3, metavar=("ENGINE", "SIZE", "TILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        engine, size, tile = args.row
        print(json.dumps(measure(args.out / "bundle", engine, int(size), int(tile))))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    found = rows(args.out)
    if args.write:
        write_json(RESULT, {"machine": asdict(machine()), "rows": found})
        pages.put(PAGE, "vae tiling", table(found))
    print(table(found))


if __name__ == "__main__":
    main()
