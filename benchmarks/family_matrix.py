"""Family x task x engine: the largest difference from diffusers' own pipeline, on shrunk models with random weights.

    python benchmarks/family_matrix.py --readme README.md
    python benchmarks/family_matrix.py --families sdxl --tasks img2img,inpaint --engines eager,onnxruntime

Every cell is one image of 64 x 64 px in float32 with guidance, made twice from the same noise: by diffusers and by a
bundle. Numbers are in units of 1/255; the promise is below one. A cell without a number says why. Cells are kept in
benchmarks/family-matrix.json with their processor, so that the table can be measured in pieces. Exit code 1 where a
number is one or more, or an engine failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pages
import torch
from PIL import Image

import accel
from accel.engines import ENGINES, status
from accel.export.pipeline import COMPONENTS, export_pipeline
from accel.files import write_json
from accel.machine import machine
from accel.models.source import open_source
from accel.pipeline.initial_latents import _OF_IMAGE, _OF_MASKED
from accel.sampling import noise

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "benchmarks" / "family-matrix.json"
SEED, STEPS, GUIDANCE, SIZE, TILE = 7, 4, 5.0, 64, 32
FAMILIES = ("sd1", "sdxl", "ssd-1b")
TASKS = ("txt2img", "img2img", "inpaint", "VAE tiling", "T2I-Adapter", "ControlNet", "MultiControlNet", "IP-Adapter")
TASKS += ("LoRA", "LoRA at run time")
COLUMNS = ("eager", "compile", "onnxruntime", "openvino", "tensorrt")
# One shape: symbolic sizes take most of the time of tracing, and the tests export with them.
PROFILE = f"batch=1,size={SIZE}"


@dataclass(frozen=True)
class Case:
    """What diffusers is called with, what a bundle is called with, and the bundle."""

    pipeline: str
    parts: dict[str, Any]
    theirs: dict[str, Any]
    ours: dict[str, Any]
    bundle: Any
    draws: tuple[int, ...] = (0,)
    loading: Mapping[str, Any] = field(default_factory=dict)


def image() -> Image.Image:
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    return Image.fromarray(np.stack([rows * 3, columns * 3, (rows + columns) % 64 * 3], -1).astype(np.uint8))


def mask() -> Image.Image:
    array = np.zeros((SIZE, SIZE), np.uint8)
    array[16:48, 20:60] = 255
    return Image.fromarray(array)


def loud(model: torch.nn.Module) -> torch.nn.Module:
    """Weights whose effect shows: a fresh ControlNet adds nothing."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() > 1):
            parameter.copy_(torch.randn_like(parameter) * 0.5 / parameter[0].numel() ** 0.5)
    return model


def cases(family: str, folder: Path) -> Iterator[tuple[str, Callable[[], Case]]]:
    """(task, what makes its case): sources and bundles are made once a family, when they are needed."""
    import diffusers

    sys.path.insert(0, str(ROOT / "tests"))
    make = importlib.import_module("conftest")
    xl = family != "sd1"
    source = make.make_sdxl(folder / "source", family) if xl else make.make_sd15(folder / "source")
    prefix = "StableDiffusionXL" if xl else "StableDiffusion"
    name = "euler" if xl else "ddim"
    made: dict[str, Any] = {}

    def exported(kind: str, components: tuple[str, ...], *, profile: str = PROFILE, **parts: Any) -> Any:
        return export_pipeline(
            open_source(source, **parts),
            folder / kind,
            profile=profile,
            components=components,
            sampler={"name": name, "steps": STEPS, "guidance": GUIDANCE},
        )

    def plain() -> Any:
        if not made:
            made["plain"] = exported("plain", COMPONENTS)
        return made["plain"]

    def bundle(kind: str, **parts: Any) -> Any:
        """What differs from the plain bundle is exported, the rest is the plain one's."""
        return make.completed(exported(kind, ("unet",), **parts), plain())

    def adapter() -> Case:
        model = diffusers.T2IAdapter(
            in_channels=3,
            channels=[8, 16, 16, 16],
            num_res_blocks=1,
            downscale_factor=8 if xl else 4,
            adapter_type="full_adapter_xl" if xl else "full_adapter",
        )
        loud(model).save_pretrained(folder / "t2i")
        return Case(
            f"{prefix}AdapterPipeline",
            {"adapter": model},
            {"image": image()},
            {"control_image": image()},
            bundle("adapter", adapter=folder / "t2i"),
        )

    def controlnet(several: bool) -> Case:
        unet = diffusers.UNet2DConditionModel.from_pretrained(source / "unet")
        config = dict(diffusers.ControlNetModel.from_unet(unet).config)
        model = diffusers.ControlNetModel.from_config(config | {"conditioning_embedding_out_channels": (8, 16, 16)})
        loud(model).save_pretrained(folder / "control")
        if not several:
            net, shown, scales, given = model, image(), 1.0, folder / "control"
        else:
            other = diffusers.ControlNetModel.from_config(model.config)
            other.load_state_dict({key: value.flip(0) for key, value in model.state_dict().items()})
            other.save_pretrained(folder / "control_1")
            net, shown, scales = [model, other], [image(), mask().convert("RGB")], [0.8, 0.5]
            given = [folder / "control", folder / "control_1"]
        return Case(
            f"{prefix}ControlNetPipeline",
            {"controlnet": net},
            {"image": shown, "controlnet_conditioning_scale": scales},
            {"control_image": shown, "control_scale": scales},
            bundle("multicontrolnet" if several else "controlnet", controlnet=given),
        )

    def lora(at_run_time: bool) -> Case:
        from safetensors.torch import save_file

        torch.manual_seed(6)
        state = {}
        for layer, module in open_source(source).load("unet").named_modules():
            if layer.endswith(("to_q", "to_v")):
                state[f"unet.{layer}.lora_A.weight"] = torch.randn(4, module.weight.shape[1]) * 0.2
                state[f"unet.{layer}.lora_B.weight"] = torch.randn(module.weight.shape[0], 4) * 0.2
        save_file(state, folder / "lora.safetensors")
        files = (f"{folder / 'lora.safetensors'}=0.7",)
        called = (f"{prefix}Pipeline", {"lora": folder / "lora.safetensors"}, {}, {})
        return (
            Case(*called, plain(), loading={"loras": files})
            if at_run_time
            else Case(*called, bundle("lora", loras=files))
        )

    def tiling() -> Case:
        made = make.completed(exported("tiled", ("vae_decoder",), profile=f"{PROFILE},vae_tile={TILE}"), plain())
        loading = {"vae_tiling": True, "vae_tile": TILE}
        return Case(f"{prefix}Pipeline", {"tile": TILE}, {}, {}, made, loading=loading)

    def ip_adapter() -> Case:
        file = _module(ROOT / "tests" / "accel" / "conftest.py").make_ip_adapter(source, folder / "ip")
        made = bundle("ip-adapter", ip_adapter=file, image_encoder=file.parent / "image_encoder")
        shown = {"ip_adapter_image": image()}
        return Case(f"{prefix}Pipeline", {"ip_adapter": file}, shown, shown | {"ip_adapter_scale": 0.6}, made)

    start = {"image": image(), "strength": 0.6}
    hole = {"image": image(), "mask_image": mask(), "strength": 0.6}
    yield "txt2img", lambda: Case(f"{prefix}Pipeline", {}, {}, {}, plain())
    yield "img2img", lambda: Case(f"{prefix}Img2ImgPipeline", {}, start, start, plain(), (_OF_IMAGE, 0))
    drawn = (_OF_IMAGE, 0, _OF_MASKED)
    yield "inpaint", lambda: Case(f"{prefix}InpaintPipeline", {}, hole, hole, plain(), drawn)
    yield "VAE tiling", tiling
    yield "T2I-Adapter", adapter
    yield "ControlNet", lambda: controlnet(False)
    yield "MultiControlNet", lambda: controlnet(True)
    yield "IP-Adapter", ip_adapter
    yield "LoRA", lambda: lora(False)
    yield "LoRA at run time", lambda: lora(True)


def _module(path: Path) -> Any:
    """A Python file as a module, whatever others are called."""
    spec = importlib.util.spec_from_file_location(f"of_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def our_noise(draws: tuple[int, ...]) -> Iterator[None]:
    """diffusers draws our noise, in the order in which it asks for it."""
    import diffusers.models.autoencoders.vae as vae

    queue = iter(draws)

    def drawn(shape, **_: Any) -> torch.Tensor:
        return torch.from_numpy(noise.normal([SEED], next(queue), tuple(shape)[1:]))

    modules = [module for name, module in list(sys.modules.items()) if name.startswith("diffusers.pipelines")]
    with mock.patch.object(vae, "randn_tensor", drawn):
        patches = [mock.patch.object(m, "randn_tensor", drawn) for m in modules if "randn_tensor" in vars(m)]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def reference(case: Case, source: Path) -> np.ndarray:
    import diffusers

    parts = {key: value for key, value in case.parts.items() if key not in ("lora", "tile", "ip_adapter")}
    pipe = getattr(diffusers, case.pipeline).from_pretrained(source, **parts)
    if "XL" not in case.pipeline:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if "lora" in case.parts:
        file = case.parts["lora"]
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        pipe.fuse_lora(lora_scale=0.7)
    if "tile" in case.parts:
        pipe.vae.enable_tiling()
        pipe.vae.tile_sample_min_size = case.parts["tile"]
        pipe.vae.tile_latent_min_size = case.parts["tile"] // pipe.vae_scale_factor
    if "ip_adapter" in case.parts:
        from transformers import CLIPVisionModelWithProjection

        file = case.parts["ip_adapter"]
        encoder = CLIPVisionModelWithProjection.from_pretrained(file.parent / "image_encoder").eval()
        pipe.register_modules(image_encoder=encoder)
        pipe.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
        pipe.set_ip_adapter_scale(0.6)
    pipe.set_progress_bar_config(disable=True)
    size = {} if case.pipeline.endswith("Img2ImgPipeline") else {"height": SIZE, "width": SIZE}
    with our_noise(case.draws):
        return pipe(
            "the cat", num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np", **size, **case.theirs
        ).images


def cell(case: Case, expected: np.ndarray, engine: str) -> float | str:
    if engine not in ENGINES or not status(engine).ok:
        return "not run: needs a GPU" if engine == "tensorrt" else "not run: not installed"
    try:
        pipe = accel.load(case.bundle, engine=engine, **case.loading)
        found = pipe("the cat", seed=SEED, output_type="np", **case.ours).images
    except Exception as error:  # of whatever library; the other cells are still worth having
        return failure("", error)
    return float(np.abs(found - expected).max() * 255)


def failure(where: str, error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"failed{where}: {type(error).__name__}: {line[:80]}"


def measured(family: str, tasks: list[str], engines: list[str]) -> Iterator[tuple[str, dict[str, float | str]]]:
    """(task, cells by engine), one task after the other."""
    with tempfile.TemporaryDirectory() as place:
        for task, build in cases(family, Path(place)):
            if task not in tasks:
                continue
            try:
                case = build()
                expected = reference(case, Path(place) / "source")
            except Exception as error:
                yield task, dict.fromkeys(engines, failure(" before any engine", error))
            else:
                yield task, {engine: cell(case, expected, engine) for engine in engines}


def kept(file: Path, document: dict[str, Any]) -> dict[str, dict[str, dict[str, float | str]]]:
    """The cells of earlier runs with the same versions, each row with its processor."""
    old = json.loads(file.read_text()) if file.is_file() else {}
    if not old or old["versions"] != document["versions"]:
        return {}
    return {
        family: {task: {"cpu": old.get("cpu", ""), **row} for task, row in rows.items()}
        for family, rows in old["cells"].items()
    }


def table(cells: dict[str, dict[str, dict[str, float | str]]]) -> str:
    lines = ["| family | task | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for family in (name for name in FAMILIES if name in cells):
        for task in (name for name in TASKS if name in cells[family]):
            values = [cells[family][task].get(column, "not measured") for column in COLUMNS]
            shown = [f"{value:.2g}" if isinstance(value, float) else value for value in values]
            lines.append(f"| {family} | {task} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def into_readme(readme: Path, document: dict[str, Any]) -> None:
    words = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    tasks: dict[str, set[str]] = {}
    for rows in document["cells"].values():
        for task, row in rows.items():
            tasks.setdefault(row["cpu"], set()).add(task)
    cpus = "; ".join(f"{cpu} ({', '.join(t for t in TASKS if t in those)})" for cpu, those in sorted(tasks.items()))
    cpus = next(iter(tasks)) if len(tasks) == 1 else cpus
    pages.put(readme, "matrix", f"{table(document['cells'])}\n\n{cpus}; {words}.")


def several(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        if other := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(other)}; of {', '.join(known)}")
        return text.split(",")

    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in (("families", FAMILIES), ("tasks", TASKS), ("engines", COLUMNS)):
        parser.add_argument(f"--{name}", type=several(values), default=values, help=f"of {','.join(values)}")
    parser.add_argument("--json", type=Path, default=CELLS, help="where cells are kept (default: %(default)s)")
    parser.add_argument("--readme", type=Path, help="replace the table between <!-- matrix --> and <!-- /matrix -->")
    args = parser.parse_args()
    names = ("torch", "diffusers", "onnxruntime", "openvino")
    document = {
        "unit": "1/255, largest difference of a pixel from diffusers",
        "versions": {name: version(name) for name in names},
    }
    document["cells"] = cells = kept(args.json, document)
    for family in args.families:
        for task, row in measured(family, args.tasks, args.engines):
            cells.setdefault(family, {}).setdefault(task, {}).update(row, cpu=machine().cpu)
            print(family, task, row, flush=True)
            write_json(args.json, document)
    print(table(cells))
    if args.readme:
        into_readme(args.readme, document)
    values = [row[key] for rows in cells.values() for row in rows.values() for key in row if key != "cpu"]
    return int(any(value.startswith("failed") if isinstance(value, str) else value >= 1 for value in values))


if __name__ == "__main__":
    sys.exit(main())
