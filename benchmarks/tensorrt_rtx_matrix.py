"""Which networks TensorRT-RTX builds, and what that costs: the real builder on random weights, without a GPU.

    python benchmarks/tensorrt_rtx_matrix.py --write               # all rows, an hour; or --rows sd15,clip-l
    python benchmarks/tensorrt_rtx_matrix.py --shrunk --out out/rtx.json   # the same networks, small: a few minutes

Each network is traced at its real size (512 px, SDXL's 1024 px), compiled in a process of its own, and audited. What it
costs does not depend on what the weights have learned. `--write` puts the rows into `tensorrt-rtx-matrix.json`, and the
table into `docs/tensorrt-rtx.md`. Nothing is run: that needs an RTX card.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SAVED, PAGE = Path(__file__).with_suffix("").with_name("tensorrt-rtx-matrix.json"), ROOT / "docs" / "tensorrt-rtx.md"
TARGETS = ["sm89", "sm120"]
MARK = "<!-- tensorrt-rtx-matrix -->"


@dataclass(frozen=True)
class Row:
    """A network of the matrix.

    Attributes:
        make: shrunk or not -> a `networks.Network` with random weights.
        gigabytes: of float16 weights at real size, about; the build needs four times that.
        size: side of the images in pixels.
        dtype: of the graph.
        opset: of the graph.
        int8: level of the layers that compute in int8 (`accel.int8.config.LEVELS`); "" for none.
    """

    name: str
    make: Callable[[bool], Any]
    gigabytes: float
    size: int = 512
    dtype: str = "float16"
    opset: int = 20
    int8: str = ""


def _unet(name: str, **more: Any) -> Callable[[bool], Any]:
    def make(shrunk: bool) -> Any:
        from diffusers import UNet2DConditionModel

        from accel.models import networks
        from accel.models.topology import narrowed, topology

        options = {key: more[key] for key in ("adapter", "control") if key in more}
        config = {key: value for key, value in more.items() if key not in options}
        whole = topology(name).config
        channels = tuple(32 * (i + 1) for i in range(len(whole["block_out_channels"])))
        model = UNet2DConditionModel(**(narrowed(name, channels, **config) if shrunk else {**whole, **config}))
        return networks.unet(model, **options)

    return make


def _controlnet(shrunk: bool) -> Any:
    from diffusers import ControlNetModel

    from accel.models import control_networks, networks

    unet = _unet("sd15")(shrunk)
    parts = control_networks.controlnet(ControlNetModel.from_unet(unet.module.model), unet.inputs)
    return networks.Network("controlnet", "controlnet", *parts)


def _adapter(shrunk: bool) -> Any:
    from diffusers import T2IAdapter

    from accel.models import control_networks, networks

    channels = [16, 32, 48, 64] if shrunk else [320, 640, 1280, 1280]
    adapter = T2IAdapter(3, channels, num_res_blocks=2, downscale_factor=8)
    shapes = [(c, 2**i) for i, c in enumerate(channels)]
    return networks.Network("t2i_adapter", "t2i_adapter", *control_networks.t2i_adapter(adapter, shapes))


def _clip(big: bool) -> Callable[[bool], Any]:
    def make(shrunk: bool) -> Any:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        from accel.models import networks

        small = dict(
            hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2, projection_dim=32
        )
        if big:
            whole = dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32)
            kind, whole = CLIPTextModelWithProjection, whole | dict(projection_dim=1280, hidden_act="gelu")
        else:
            whole = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
            kind = CLIPTextModel
        model = kind(CLIPTextConfig(**(small if shrunk else whole)))
        return networks.text_encoder(model, hidden_states=big)

    return make


def _vae(end: str, tiny: bool = False) -> Callable[[bool], Any]:
    def make(shrunk: bool) -> Any:
        from diffusers import AutoencoderKL, AutoencoderTiny

        from accel.models import networks

        if tiny:
            model = AutoencoderTiny()
        else:
            channels = (16, 32, 32, 32) if shrunk else (128, 256, 512, 512)
            model = AutoencoderKL(
                block_out_channels=channels,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                norm_num_groups=8 if shrunk else 32,
            )
        return getattr(networks, f"vae_{end}")(model)

    return make


ROWS = (
    Row("sd-tiny", _unet("sd15-tiny"), 0.65),
    Row("sd-tiny fp32", _unet("sd15-tiny"), 1.3, dtype="float32"),
    Row("sd-tiny opset 23", _unet("sd15-tiny"), 0.65, opset=23),
    Row("sd-tiny T2I-Adapter input", _unet("sd15-tiny", adapter=1), 0.65),
    Row("sd-tiny LCM", _unet("sd15-tiny", time_cond_proj_dim=256), 0.65),
    Row("sd-tiny inpainting", _unet("sd15-tiny", in_channels=9), 0.65),
    Row("sd15", _unet("sd15"), 1.72),
    Row("sd15 ControlNet input", _unet("sd15", control=True), 1.72),
    Row("sd2", _unet("sd2"), 1.73),
    Row("vega", _unet("vega"), 1.5, size=1024),
    Row("ssd-1b", _unet("ssd-1b"), 2.65, size=1024),
    Row("sdxl", _unet("sdxl"), 5.1, size=1024),
    Row("controlnet sd15", _controlnet, 0.72),
    Row("t2i-adapter", _adapter, 0.16),
    Row("clip-l", _clip(False), 0.25),
    Row("openclip-bigg", _clip(True), 1.4),
    Row("vae decoder", _vae("decoder"), 0.1),
    Row("vae encoder", _vae("encoder"), 0.07),
    Row("tiny vae decoder", _vae("decoder", tiny=True), 0.003),
    Row("tiny vae encoder", _vae("encoder", tiny=True), 0.003),
)


def measure(row: Row, shrunk: bool) -> dict[str, Any]:
    """Trace, build and audit one network; what it took, or why it does not build."""
    from accel.bundle.shape_profiles import Profile, Range
    from accel.errors import UserError
    from accel.export.tensorrt import memory, shapes
    from accel.export.tensorrt.options import BuildOptions

    size = 64 if shrunk else row.size
    batch = Range(1, 1, 2)
    profile = Profile("matrix", batch, Range(size, size, size), Range(size, size, size))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        path, component, parameters = traced(row, shrunk, profile, Path(folder))
        trace_seconds = time.perf_counter() - started
        dims = {name: limits for name, limits in component.dims.items()}
        described = {
            "name": profile.name,
            "dims": {name: [getattr(limits, end) for end in shapes.ENDS] for name, limits in dims.items()},
            "shapes": shapes.shapes_of(component, dims),
        }
        weights = path.with_name("model.safetensors").stat().st_size
        needed = memory.of_graph(path, weights, {name: limits.max for name, limits in dims.items()})
        found: dict[str, Any] = {
            "name": row.name,
            "dtype": row.dtype,
            "opset": row.opset,
            "size": size,
            "parameters": parameters,
            "weights": weights,
            "estimate": asdict(needed),
            "trace_seconds": round(trace_seconds, 1),
        }
        try:
            return found | built(row, path, described, asdict(BuildOptions()))
        except UserError as error:
            return found | {"problem": error.message}


def traced(row: Row, shrunk: bool, profile: Any, folder: Path) -> tuple[Path, Any, int]:
    """The graph of a network with random weights, as an export writes it."""
    import torch

    from accel.bundle import Component
    from accel.dtypes import ALWAYS_FLOAT32
    from accel.export.graph import precision, trace
    from accel.models import networks

    torch.manual_seed(0)
    network = row.make(shrunk)
    network.module.eval()
    networks.save_config(network, folder)
    names = {name.removeprefix("model.") for name, _ in network.module.named_modules()}
    kept = tuple(n for n in ALWAYS_FLOAT32 if n in names) if row.dtype == "float16" else ()
    policy = precision.DtypePolicy(row.dtype, kept)
    layers = _packed(network.module.model, row) if row.int8 else None
    inputs, outputs = (precision.with_dtype(specs, row.dtype) for specs in (network.inputs, network.outputs))
    parameters = precision.save_weights(network.module.model, folder / trace.WEIGHTS, policy)
    name, kind = network.name, network.kind
    del network
    gc.collect()
    module = networks.rebuild(kind, folder / "config.json", folder / trace.WEIGHTS, inputs, outputs, layers)
    networks.keep_float32(module.model, kept)
    dims = profile.dims(vae_scale=8, latent_multiple=8, guidance=False)
    used = {d for spec in (*inputs, *outputs) for d in spec.shape if isinstance(d, str)}
    dims = {d: limits for d, limits in dims.items() if d in used}
    trace.export_graph(networks.Network(name, kind, module, inputs, outputs), dims, folder, opset=row.opset)
    component = Component(name=name, kind=kind, graph="", weights="", inputs=inputs, outputs=outputs, dims=dims)
    return folder / trace.GRAPH, component, parameters


def _packed(model: Any, row: Row) -> dict[str, list[str]]:
    """Put a network into int8 with any ranges: what the compiler makes of it does not depend on their values."""
    import torch

    from accel.int8 import fake_quant, packed
    from accel.int8.config import Int8Config

    fake_quant.attach(model, Int8Config(level=row.int8))
    for _, own in fake_quant.ranges(model):
        own.set_scale(0.05)
    layers = fake_quant.traits(model)
    packed.pack(model, getattr(torch, row.dtype))
    return layers


def built(row: Row, path: Path, described: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    import onnx

    from accel.export.tensorrt import audit, child
    from accel.export.tensorrt.compiler import Job
    from accel.trt.flavours import RTX

    started = time.perf_counter()
    forms = list(RTX.forms)
    job = Job("tensorrt-rtx", row.name, str(path), [dict(described)], dict(options), TARGETS, forms=forms)
    done = child.compile_apart(job, lambda *_: None)
    counts = audit.audit(done.layers, audit.of_graph(onnx.load(str(path), load_external_data=False)))
    wanted = "int8" if row.int8 else {"float16": "fp16"}.get(row.dtype, "fp32")
    audit.check(row.name, wanted, counts)
    return {
        "bytes": len(done.data),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": done.cpu_seconds,
        "host": done.peak_memory,
        "activations": done.activations,
        "layers": counts["layers"],
        "heavy": counts["heavy"],
        "fused_attentions": counts["fused_attentions"],
        "warnings": done.warnings[:5],
    }


def table(rows: list[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| network | weights | engine file | CPU s | host memory | activations (estimate) | work in | fused |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        weights = f"{row['weights'] / 1e6:,.0f} MB" if "weights" in row else ""
        if "problem" in row:
            lines.append(f"| {row['name']} | {weights} | {row['problem']} | | | | | |")
            continue
        heavy = ", ".join(f"{count} {kind}" for kind, count in row["heavy"].items())
        activations = f"{row['activations'] / 1e6:,.0f} ({row['estimate']['activations'] / 1e6:,.0f}) MB"
        lines.append(
            f"| {row['name']} | {weights} | {row['bytes'] / 1e6:,.0f} MB | {row['cpu_seconds']:.1f} "
            f"| {row['host'] / 1e6:,.0f} MB | {activations} | {heavy} | {row['fused_attentions']} |"
        )
    return "\n".join(lines)


def write(found: list[Mapping[str, Any]]) -> None:
    """Keep the rows, those of earlier runs too, and put the table into the page."""
    saved = {row["name"]: row for row in json.loads(SAVED.read_text())["rows"]} if SAVED.exists() else {}
    saved |= {row["name"]: row for row in found}
    rows = [saved[row.name] for row in ROWS if row.name in saved]
    document = {"library": version(), "targets": TARGETS, "profile": "batch 1-2 at one size", "rows": rows}
    SAVED.write_text(json.dumps(document, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(MARK)
    after = rest.partition(MARK)[2]
    PAGE.write_text(f"{before}{MARK}\n{table(rows)}\n{MARK}{after}")


def version() -> str:
    from accel.trt import library

    return str(library.load("tensorrt-rtx"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="names with commas between them (default: all)")
    parser.add_argument("--shrunk", action="store_true", help="the same networks with few channels")
    parser.add_argument("--memory", type=float, default=24.0, metavar="GB", help="leave out what needs more (24)")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--write", action="store_true", help="write benchmarks/tensorrt-rtx-matrix.json and the page")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one row in this process, as JSON on the last line
    args = parser.parse_args()
    if args.one:
        row = next(row for row in ROWS if row.name == args.one)
        print(json.dumps(measure(row, args.shrunk)))
        return
    names = args.rows.split(",") if args.rows else [row.name for row in ROWS]
    found = []
    for row in (row for row in ROWS if row.name in names):
        needs = 4 * row.gigabytes
        if not args.shrunk and needs > args.memory:
            found.append({"name": row.name, "problem": f"not tried: needs about {needs:.0f} GB of memory"})
        else:
            command = [sys.executable, __file__, "--one", row.name, *(["--shrunk"] if args.shrunk else [])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            lines = done.stdout.strip().splitlines()
            found.append(json.loads(lines[-1]) if done.returncode == 0 else {"name": row.name, "problem": "failed"})
        print(table(found[-1:]).splitlines()[-1], flush=True)
        if args.write and not args.shrunk:
            write(found)
    if args.out:
        args.out.write_text(json.dumps({"library": version(), "targets": TARGETS, "rows": found}, indent=1) + "\n")
    if any(row.get("problem") == "failed" for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
