"""The memory that each published DMD2 setting would need on one device, and what makes it smaller.

    python benchmarks/dmd2_plans.py --write

asks `accel distill dmd2 --memory-estimate` (nothing is loaded; configs only) and writes benchmarks/dmd2-plans.json and
the table of docs/dmd2.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pages
from random_pipeline import write

from accel import __version__
from accel.files import write_json

ROOT = Path(__file__).parents[1]
LORA = ["--rank", "64", "--critic-rank", "64"]
SMALLER = ["--optimizer", "adamw8bit", "--offload-teacher"]
# Label -> (recipe, model, teacher, options).
ROWS = {
    "SD1.5, batch 8": ("dmd2_sd15", "sd15", None, ["--batch", "8"]),
    "SD-Tiny from SD1.5, batch 8": ("dmd2_sd15", "sd15-tiny", "sd15", ["--batch", "8"]),
    "SDXL, batch 2, as published": ("dmd2_sdxl", "sdxl", None, ["--batch", "2"]),
    "SDXL, batch 2, 8-bit Adam, teacher away": ("dmd2_sdxl", "sdxl", None, ["--batch", "2", *SMALLER]),
    "SDXL, batch 2, FSDP2 on 8": ("dmd2_sdxl", "sdxl", None, ["--batch", "2", "--processes", "8"]),
    "SDXL, batch 2, LoRA generator": ("dmd2_sdxl_lora", "sdxl", None, ["--batch", "2"]),
    "SDXL, batch 2, both LoRA on one network": ("dmd2_sdxl", "sdxl", None, ["--batch", "2", *LORA]),
    "SDXL, batch 1, both LoRA on one network": ("dmd2_sdxl", "sdxl", None, ["--batch", "1", *LORA]),
}


def plan(recipe: str, model: Path, teacher: Path | None, options: list[str]) -> dict:
    command = [sys.executable, "-m", "accel", "distill", "dmd2", "--recipe", recipe, "--model", str(model)]
    command += ["--teacher", str(teacher)] if teacher else []
    command += ["--data", "digits", "--memory-estimate", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: dict[str, dict]) -> str:
    names = list(dict.fromkeys(name for row in rows.values() for name in row["parts"]))
    lines = [f"| GiB | {' | '.join(names)} | peak |", "|---" * (len(names) + 2) + "|"]
    for label, row in rows.items():
        cells = [f"{row['parts'].get(name, 0) / 2**30:.1f}" for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} | **{row['peak_bytes'] / 2**30:.1f}** |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the JSON and the table of docs/dmd2.md")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, (recipe, model, teacher, options) in ROWS.items():
            paths = [Path(folder) / name for name in (model, teacher) if name]
            for path in paths:
                if not path.exists():
                    write(path.name, path, weights=False)
            rows[label] = plan(recipe, paths[0], paths[1] if teacher else None, options) | {
                "recipe": recipe,
                "options": options,
            }
            print(f"{label}: {rows[label]['peak_bytes'] / 2**30:.1f} GiB", flush=True)
    if args.write:
        document = {
            "schema": "accel-dmd2-plans/1",
            "command": "python benchmarks/dmd2_plans.py --write",
            "accel": __version__,
            "rows": rows,
        }
        write_json(ROOT / "benchmarks/dmd2-plans.json", document)
        pages.put(ROOT / "docs/dmd2.md", "dmd2-plans", table(rows))


if __name__ == "__main__":
    main()
