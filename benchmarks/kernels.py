"""What can be said of our kernels without a GPU: errors in Triton's interpreter, and what the compiler makes of them.

    python benchmarks/kernels.py --write      # benchmarks/kernels.json, and the tables of docs/kernels.md

Errors are against float64, beside those of torch's own operations in the same dtype. Cubins are compiled by Triton's
own ptxas for each architecture: registers, bytes of stack and local memory (spills), widths of loads and stores. Bytes
are counted: what the launches move against the least that the operation has to. No time is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ARCHITECTURES = (80, 86, 89, 90, 120)
# (channels, groups, height and width): of SD1.5, SDXL and the VAE, and awkward ones.
NORMS = [
    (32, 32, (3, 5)),
    (320, 32, (7, 11)),
    (960, 32, (5, 3)),
    (1920, 32, (2, 3)),
    (128, 32, (17, 13)),
    (40, 8, (13, 17)),
]
ROWS = [(5, 37), (3, 320), (2, 1280), (1, 2560)]
GATES = [(7, 11, 37), (1, 3, 1280), (2, 5, 2560)]
DTYPES = ("float16", "float32")  # the interpreter truncates to bfloat16, where GPUs round
# Where the bytes are counted: channels, side of the image, image's elements for the gate.
COUNTED = {"SD1.5 UNet 64 x 64": (320, 64), "SDXL UNet 128 x 128": (320, 128), "VAE 1024 x 1024": (128, 1024)}


def errors() -> list[dict[str, Any]]:
    """Largest difference from float64 of each output, ours and torch's; runs in Triton's interpreter."""
    import torch

    rows = []
    for dtype in DTYPES:
        for channels, groups, size in NORMS:
            for shifted in (True, False):
                rows += _norm(torch, getattr(torch, dtype), channels, groups, size, shifted)
        for shape in GATES:
            rows += _gate(torch, getattr(torch, dtype), shape)
        for shape in ROWS:
            for rounded in ("int8", "float8_e4m3fn"):
                rows += _rounded(torch, getattr(torch, dtype), shape, getattr(torch, rounded))
    return rows


def _norm(torch: Any, dtype: Any, channels: int, groups: int, size: Any, shifted: bool) -> list[dict[str, Any]]:
    op, functional = import_module("accel.kernels.group_norm_silu"), torch.nn.functional
    torch.manual_seed(0)
    x = (torch.randn(2, channels, *size) + 0.5).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (1 + 0.1 * torch.randn(channels)).to(dtype), (0.1 * torch.randn(channels)).to(dtype)
    shift, grad = torch.randn(2, channels).to(dtype) if shifted else None, torch.randn_like(x)

    def plain(to: Any) -> list[Any]:
        given = [
            value if value is None else value.detach().to(to, copy=True).requires_grad_()
            for value in (x, weight, bias, shift)
        ]
        h = given[0] if shift is None else given[0] + given[3][:, :, None, None]
        y = functional.silu(functional.group_norm(h, groups, given[1], given[2]))
        y.backward(grad.to(to))
        return [y.detach(), *(value.grad for value in given if value is not None)]

    y, mean, rstd = op.launch(x, weight, bias, shift, groups, 1e-5, True)
    gradients = op.launch_backward(grad, x, weight, bias, shift, mean, rstd, True)
    ours = [y, *gradients[: 4 if shifted else 3]]
    what = dict(op="group_norm_silu", dtype=str(dtype)[6:], shape=[2, channels, *size], groups=groups, shift=shifted)
    return _rows(what, ("y", "dx", "dweight", "dbias", "dshift"), ours, plain(dtype), plain(torch.float64))


def _gate(torch: Any, dtype: Any, shape: Any) -> list[dict[str, Any]]:
    op = import_module("accel.kernels.geglu")
    torch.manual_seed(0)
    x = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)
    grad = torch.randn(*shape).to(dtype)

    def plain(to: Any) -> list[Any]:
        given = x.detach().to(to, copy=True).requires_grad_()
        value, gate = given.chunk(2, dim=-1)
        y = value * torch.nn.functional.gelu(gate)
        y.backward(grad.to(to))
        return [y.detach(), given.grad]

    ours = [op.launch(x), op.launch_backward(grad, x)]
    what = dict(op="geglu", dtype=str(dtype)[6:], shape=list(x.shape))
    return _rows(what, ("y", "dx"), ours, plain(dtype), plain(torch.float64))


def _rounded(torch: Any, dtype: Any, shape: Any, to: Any) -> list[dict[str, Any]]:
    """What is left of x after rounding, against x itself: torch's own rounds in float64."""
    op = import_module("accel.kernels.quant_rowwise")
    torch.manual_seed(0)
    x = torch.randn(*shape).to(dtype)
    x[0] *= 100

    def back(made: Any) -> list[Any]:
        return [made[0].double() * made[1].double()[..., None], made[1]]

    exact = [x.double(), x.double().abs().amax(-1) / op.LIMITS[to]]
    what = dict(op="quant_rowwise", dtype=str(dtype)[6:], shape=list(shape), to=str(to)[6:])
    return _rows(what, ("y", "scale"), back(op.launch(x, to)), back(op.reference(x.double(), to)), exact)


def _rows(what: dict[str, Any], names: Any, ours: Any, theirs: Any, exact: Any) -> list[dict[str, Any]]:
    def error(made: Any, wanted: Any) -> float:
        return float((made.double() - wanted).abs().max())

    return [
        what | {"output": name, "ours": error(a, c), "torch": error(b, c), "largest": float(c.abs().max())}
        for name, a, b, c in zip(names, ours, theirs, exact, strict=False)
    ]


def cubins(architectures: Any = ARCHITECTURES) -> list[dict[str, Any]]:
    """What Triton compiles for each architecture; must not run under the interpreter."""
    half, single = "*fp16", "*fp32"
    norm, gate = import_module("accel.kernels.group_norm_silu"), import_module("accel.kernels.geglu")
    quant = import_module("accel.kernels.quant_rowwise")
    rows, columns = norm.tile_of(320)
    tile = dict(ROWS=rows, COLUMNS=columns, SHIFT=True)
    halves = dict.fromkeys(("x", "shift", "weight", "bias", "y", "grad", "dx"), half)
    singles = dict.fromkeys(("mean", "rstd", "partial", "a", "b"), single)
    bits = dict(x=half, scale="*fp32")
    rounding = dict(BLOCK=2048)
    kernels = [
        ("group_norm_silu", norm._sums, tile),
        ("group_norm_silu", norm._statistics, dict(EACH=16)),
        ("group_norm_silu", norm._apply, tile | dict(SILU=True)),
        ("group_norm_silu", norm._sums_backward, tile | dict(SILU=True)),
        ("group_norm_silu", norm._apply_backward, tile | dict(SILU=True)),
        ("geglu", gate._forward, dict(BLOCK=gate.BLOCK)),
        ("geglu", gate._backward, dict(BLOCK=gate.BLOCK)),
    ]
    made = [
        {"op": op, "kernel": kernel.__name__, "sm": sm} | _compiled(kernel, halves | singles, constants, sm)
        for sm in architectures
        for op, kernel, constants in kernels
    ]
    for sm in architectures:
        for kernel, q in ((quant._round_int8, "*i8"), (quant._round_fp8, "*fp8e4nv")):
            if q == "*i8" or sm >= 89:  # what has products in fp8
                row = {"op": "quant_rowwise", "kernel": kernel.__name__, "sm": sm}
                made.append(row | _compiled(kernel, bits | {"q": q}, rounding, sm))
    return made


def _compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], sm: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, hints = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else pointers.get(name, "fp32" if name == "eps" else "i32")
        signature[name] = kind
        # What a launch finds out by itself: addresses and these sizes are multiples of sixteen.
        if kind.startswith("*") or name in ("channels", "count"):
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=hints)
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32))
    widths = {
        way: max(_bits(found) for found in re.findall(rf"{way}\.global[\w.]*", made.asm["ptx"])) for way in ("ld", "st")
    }
    return _resources(made.asm["cubin"]) | {"load_bits": widths["ld"], "store_bits": widths["st"]}


def _bits(instruction: str) -> int:
    vector, width = re.search(r"\.v(\d)", instruction), re.search(r"\.[bfus](\d+)$", instruction)
    return (int(vector[1]) if vector else 1) * int(width[1] if width else 32)


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", said.stdout))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "local": int(found["LOCAL"])}


def counted() -> list[dict[str, Any]]:
    """Bytes that the forward launches move, and the least that the operation has to, at batch 1 in half precision."""
    norm = import_module("accel.kernels.group_norm_silu")
    rows = []
    for name, (channels, side) in COUNTED.items():
        elements = channels * side * side
        tiles = math.ceil(side * side / norm.tile_of(channels)[0])
        partial = 2 * tiles * channels * 4
        moved, least = 3 * elements * 2 + 2 * partial, 3 * elements * 2
        eager = 7 * elements * 2
        rows.append(dict(op="group_norm_silu", where=name, moved=moved, least=least, eager=eager))
    for name, elements in {"SD1.5 64 x 64": 4096 * 1280, "SDXL 64 x 64": 4096 * 2560}.items():
        rows.append(dict(op="geglu", where=name, moved=6 * elements, least=6 * elements, eager=10 * elements))
    # abs, max, quotient, rounding and conversion, each a pass in eager torch
    for name, (tokens, width) in {"SD1.5 64 x 64": (4096, 320), "SDXL 64 x 64": (4096, 640)}.items():
        moved, elements = tokens * (3 * width + 4), tokens * width
        rows.append(dict(op="quant_rowwise", where=name, moved=moved, least=3 * elements, eager=17 * elements))
    return rows


def part(name: str, **environment: str) -> list[dict[str, Any]]:
    """A part of the figures, made in a process of its own: the interpreter is chosen when Triton is imported."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables |= {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, __file__, "--part", name], env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def tables(document: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| op | dtype | output | ours | torch |", "|---|---|---|---|---|"]
    worst: dict[tuple[str, str, str], tuple[float, float]] = {}
    for row in document["errors"]:
        key = (row["op"], row["dtype"], row["output"])
        size = max(row["largest"], 1.0)  # a shift of groups of one channel changes nothing: its gradient is 0
        scaled = (row["ours"] / size, row["torch"] / size)
        worst[key] = max(worst.get(key, (0.0, 0.0)), scaled)
    lines += [f"| `{op}` | {dtype} | {out} | {a:.1e} | {b:.1e} |" for (op, dtype, out), (a, b) in worst.items()]
    lines += [
        "",
        "Largest error against float64, as a share of the largest value where that is above 1, over all shapes.",
        "",
    ]
    lines += ["| op | kernel | registers: " + " | ".join(f"sm_{sm}" for sm in ARCHITECTURES) + " | spills | loads |"]
    lines += ["|---|---|" + "---|" * (len(ARCHITECTURES) + 2)]
    names = dict.fromkeys((row["op"], row["kernel"]) for row in document["cubins"])
    for op, kernel in names:
        own = [row for row in document["cubins"] if (row["op"], row["kernel"]) == (op, kernel)]
        by_sm = {row["sm"]: row["registers"] for row in own}
        registers = " | ".join(str(by_sm.get(sm, "-")) for sm in ARCHITECTURES)
        spills, bits = max(row["stack"] + row["local"] for row in own), min(row["load_bits"] for row in own)
        lines.append(f"| `{op}` | `{kernel}` | {registers} | {spills} bytes | {bits} bits |")
    lines += ["", "| op | where | least | moved | of the roofline | eager torch moves |", "|---|---|---|---|---|---|"]
    for row in document["counted"]:
        least, moved, eager = (f"{row[key] / 1e6:.2f} MB" for key in ("least", "moved", "eager"))
        share = row["least"] / row["moved"]
        lines.append(f"| `{row['op']}` | {row['where']} | {least} | {moved} | {share:.0%} | {eager} |")
    here = document["machine"]
    lines += ["", f"Triton {here['triton']}, torch {here['torch']}. `python benchmarks/kernels.py --write`"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/kernels.json and docs/kernels.md's tables"
    )
    parser.add_argument("--part", choices=("errors", "cubins"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps({"errors": errors, "cubins": cubins}[args.part]()))
        return
    from importlib.metadata import version

    machine = {name: version(name) for name in ("torch", "triton")}
    made = {"errors": part("errors", TRITON_INTERPRET="1"), "cubins": part("cubins"), "counted": counted()}
    document = {"command": "python benchmarks/kernels.py --write", "machine": machine} | made
    print(tables(document))
    if args.write:
        import pages

        (HERE / "kernels.json").write_text(json.dumps(document, indent=1) + "\n")
        pages.put(HERE.parent / "docs/kernels.md", "kernels", tables(document))


if __name__ == "__main__":
    main()
