"""What half an hour on a GPU has to settle, as one script that goes on where it stopped.

    python benchmarks/gpu_survey.py --out out/gpu-survey --seconds 560      # again and again, until it says "complete"
    python benchmarks/gpu_survey.py --out out/gpu-survey --report           # writes docs/gpu.md's tables and the JSON

Cases are data, in the order in which decisions need them; each has a budget in seconds, and none is begun that would
not end in time. A row is written and flushed as soon as it is measured: `rows.jsonl`, one JSON object a line. A case
that fails has a row with the error, and the next one runs; `--again` tries those once more. `--list` says what there
is. `--tiny --device cpu` runs the same code on small sizes in seconds. Models have random weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from gpu_cases import Case, Survey, full, tiny
from gpu_measures import described

HERE = Path(__file__).resolve().parent


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows so far; a line that a killed run left half written is left out."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["step"], row["key"]] = row
    return list(found.values())


def survey(cases: list[Case], file: Path, *, seconds: float, again: bool = False) -> list[Case]:
    """Measure what has no row yet, as far as the time goes.

    Args:
        seconds: after which nothing is begun that may not end before.
        again: measure what failed once more.

    Returns:
        The cases that are left.
    """
    ends = time.perf_counter() + seconds
    done = {(row["step"], row["key"]) for row in rows_of(file) if row["ok"] or not again}
    left = [case for case in cases if (case.step, case.key) not in done]
    file.parent.mkdir(parents=True, exist_ok=True)
    torn = file.is_file() and not file.read_bytes().endswith(b"\n")
    with file.open("a") as out:
        out.write("\n" if torn else "")
        waiting = []
        for case in left:
            if time.perf_counter() + case.seconds > ends:
                waiting.append(case)
                continue
            began = time.perf_counter()
            try:
                row = {"ok": True, "figures": case.run()}
            except Exception as error:
                row = {"ok": False, "error": described(error)}
            row = {"step": case.step, "key": case.key} | row | {"seconds": round(time.perf_counter() - began, 2)}
            out.write(json.dumps(row) + "\n")
            out.flush()
            os.fsync(out.fileno())
            print(f"{case.step}: {case.key}: {row.get('figures') or row.get('error')}", flush=True)
            _forget()
    return waiting


def _forget() -> None:
    """Give back what a case held, its compiled code too."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def report(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: what follows from them, then a table for each step."""
    lines = decisions(rows)
    for step in dict.fromkeys(row["step"] for row in rows if row["step"] != "machine"):
        own = [row for row in rows if row["step"] == step]
        names = list(dict.fromkeys(name for row in own for name in row.get("figures", {})))
        lines += ["", f"| {step} | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        for row in own:
            if row["ok"]:
                cells = [_cell(row["figures"].get(name)) for name in names]
            else:
                cells = [f"failed: {row['error'][:120]}".replace("|", "/"), *[""] * (len(names) - 1)]
            lines.append(f"| {row['key']} | " + " | ".join(cells or ["-"]) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def decisions(rows: list[dict[str, Any]]) -> list[str]:
    """What the survey was made to settle, as far as its rows say."""
    ms = {(r["step"], r["key"]): r["figures"]["ms"] for r in rows if r["ok"] and "ms" in r["figures"]}
    by_step = {step: {key: value for (s, key), value in ms.items() if s == step} for step, _ in ms}
    out = []
    asked = (
        ("Channels-last without our kernels, VAE", "vae decode", "nchw, torch, eager", "nhwc, torch, eager"),
        ("Our kernels in channels-last, VAE", "vae decode", "nhwc, torch, eager", "nhwc, patched, eager"),
        ("CUDA graph against eager, UNet", "unet", "nchw eager", "nchw graph"),
        ("CUDA graph with our kernels against torch.compile, UNet", "unet", "nchw compile", "nhwc patched graph"),
        ("Linear layers in int8, UNet", "unet", "nhwc patched graph", "nhwc patched:int8 graph"),
    )
    for question, step, before, after in asked:
        own, said = by_step.get(step, {}), []
        for key, a in own.items():
            what = key.removesuffix(before)
            if key.endswith(before) and (b := own.get(what + after)) is not None:
                said.append(f"{what.rstrip(', ')}: {a:.3g} -> {b:.3g} ms ({a / b:.2f}x)")
        out.append(f"* {question}: {'; '.join(said) or 'not measured'}.")
    engines = sorted((value, key) for key, value in by_step.get("engine", {}).items())
    said = "; ".join(f"{key}: {value:.3g} ms" for value, key in engines)
    out.append(f"* Engines on one UNet, fastest first: {said or 'not measured'}.")
    fastest: dict[str, tuple[float, str]] = {}
    for key, value in by_step.get("attention", {}).items():
        shape, _, kernel = key.rpartition(", ")
        fastest[shape] = min(fastest.get(shape, (float("inf"), "")), (value, kernel))
    said = "; ".join(f"{shape}: {kernel} ({value:.3g} ms)" for shape, (value, kernel) in fastest.items())
    return [*out, f"* Fastest attention: {said or 'not measured'}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu-survey"), help="folder of rows.jsonl")
    parser.add_argument("--seconds", type=float, default=560, help="begin nothing that may not end in this time")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--only", default="", help="steps whose name begins so")
    parser.add_argument("--again", action="store_true", help="measure what failed once more")
    parser.add_argument("--list", action="store_true", help="list the cases and their budgets")
    parser.add_argument("--report", action="store_true", help="write docs/gpu.md and benchmarks/gpu-survey.json")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs/gpu.md", help="page of --report")
    args = parser.parse_args()
    file = args.out / "rows.jsonl"
    if args.report:
        import pages

        rows = rows_of(file)
        document = {"command": "python benchmarks/gpu_survey.py --out out/gpu-survey", "rows": rows}
        own = args.page == HERE.parent / "docs/gpu.md"
        target = HERE / "gpu-survey.json" if own else args.page.with_suffix(".json")
        target.write_text(json.dumps(document, indent=1) + "\n")
        pages.put(args.page, "gpu-survey", report(rows))
        return
    cases = list(Survey(args.device, tiny() if args.tiny else full(), whole=not args.tiny).cases())
    cases = [case for case in cases if case.step.startswith(args.only)]
    if args.list:
        print(*(f"{case.seconds:5.0f} s  {case.step}: {case.key}" for case in cases), sep="\n")
        return
    left = survey(cases, file, seconds=args.seconds, again=args.again)
    print(f"{len(left)} of {len(cases)} cases left: run it again" if left else "complete: --report writes the page")


if __name__ == "__main__":
    main()
