"""One model in every runtime that reads it: does each draw the same image, from its own files and with our noise?

    bash benchmarks/runtimes.sh out/runtimes --write    # benchmarks/runtimes.json, docs/runtimes.md

Three models: digits in four steps, which predicts v; a small one with random weights that predicts noise, as SD1.5
does, in the same four steps; and the same one in ten guided steps of DDIM. The number of steps and the guidance have to
be given to other libraries, because neither model_index.json nor a scheduler config holds them. Where a library takes a
name of the hub, that is a hub on this machine (tests/fakes/hub.py) which the model was pushed to.

The reference is accel on ONNX Runtime. `runtimes.py draw RUNTIME FOLDER` is the part that runs in the environment of a
library; it needs numpy and that library alone. The other way round, folders that other libraries wrote are drawn by
them, and by accel as they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).parents[1]
SEED = 7
CASES = {
    "digits": dict(prompt="a handwritten seven", what="four steps, predicts v"),
    "random": dict(prompt="a cat", what="four steps, predicts noise"),
    "guided": dict(prompt="a cat", negative="a dog", what="ten guided steps of DDIM"),
}
PACKAGES = "accel-diffusion diffusers optimum optimum-onnx optimum-intel onnxruntime openvino openvino-genai torch"


# What is drawn from: in accel's environment


THEIRS = ("optimum-onnx exports", "optimum-intel exports")


def load(name: str, path: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def make(folder: Path) -> None:
    """`folder/NAME/` with `pipeline`, `bundle`, `genai`, and `ours.npz`: noise, image and how it was made."""
    from accel.assets import resolve
    from accel.bundle import Bundle
    from accel.export.openvino_genai import write
    from accel.export.pipeline import export_pipeline

    models = load("models", "tests/conftest.py")
    constants = {"name": "dmd2", "timesteps": [999, 749, 499, 249], "guidance": 0.0}
    for name in CASES:
        place = folder / name
        model = place / "pipeline"
        if name == "digits":
            shutil.copytree(resolve("digits/4step"), model)
        else:
            models.make_sd15(model)
        if name == "random":
            (model / "sampler.json").write_text(json.dumps(constants))
        if name == "guided":
            edit(model / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
            edit(model / "scheduler/scheduler_config.json", _class_name="DDIMScheduler", clip_sample=False)
            (model / "sampler.json").write_text(json.dumps({"name": "ddim", "steps": 10, "guidance": 4.0}))
        export_pipeline(model, place / "bundle", profile="batch=1-2,size=64")
        write(Bundle.open(place / "bundle"), place / "genai")
        reference(place, CASES[name])


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def reference(place: Path, case: dict[str, Any]) -> None:
    import accel
    from accel.sampling import noise

    with accel.load(place / "bundle", engine="onnxruntime") as pipe:
        manifest = pipe.bundle.manifest
        sampling = manifest.sampler
        steps = len(sampling.get("timesteps", ())) or sampling["steps"]
        side = manifest.pipeline["native_size"] // manifest.pipeline["vae_scale"]
        shape = (manifest.pipeline["latent_channels"], side, side)
        draws = np.stack([noise.normal([SEED], i, shape) for i in range(steps)])
        image = ours(pipe, case, draws)
    how = dict(steps=steps, guidance=float(sampling["guidance"]))
    np.savez(place / "ours.npz", draws=draws, image=image, **how)


def ours(pipe: Any, case: dict[str, Any], draws: np.ndarray, **more: Any) -> np.ndarray:
    negative = {"negative_prompt": case["negative"]} if "negative" in case else {}
    call = dict(latents=draws[0], renoise=lambda i: draws[i + 1], output_type="np")
    return pipe(case["prompt"], **negative, **call, **more).images[0]


# The runtimes: (folder of the model, its case, the reference) -> image [H, W, 3] in [0, 1]


def accel_engine(engine: str) -> Callable[..., np.ndarray]:
    def draw(place: Path, case: dict[str, Any], saved: Any) -> np.ndarray:
        import accel

        with accel.load(place / "bundle", engine=engine) as pipe:
            return ours(pipe, case, saved["draws"])

    return draw


def accel_from_hub(place: Path, case: dict[str, Any], saved: Any) -> np.ndarray:
    import accel

    with accel.AccelPipeline.from_pretrained(f"someone/{place.name}", engine="onnxruntime") as pipe:
        return ours(pipe, case, saved["draws"], progress=False)


def modular(place: Path, case: dict[str, Any], saved: Any) -> np.ndarray:
    """diffusers' ModularPipeline. It hands on what its block takes; noise after a step is none of that, so a seed."""
    from diffusers import ModularPipeline

    pipe = ModularPipeline.from_pretrained(f"someone/{place.name}", trust_remote_code=True)
    negative = {"negative_prompt": case["negative"]} if "negative" in case else {}
    call = dict(prompt=case["prompt"], seed=SEED, engine="onnxruntime", output_type="np", output="images")
    return pipe(**call, **negative)[0]


def like_diffusers(pipe: Any, case: dict[str, Any], saved: Any) -> np.ndarray:
    """The image of a pipeline class of diffusers, optimum or optimum-intel; the noise after each step is ours."""
    import torch
    from diffusers.schedulers import scheduling_lcm

    pipe.set_progress_bar_config(disable=True)
    later = iter(saved["draws"][1:])
    negative = {"negative_prompt": case["negative"]} if "negative" in case else {}
    with mock.patch.object(scheduling_lcm, "randn_tensor", lambda shape, **_: torch.from_numpy(next(later))):
        return pipe(
            case["prompt"],
            num_inference_steps=int(saved["steps"]),
            guidance_scale=float(saved["guidance"]),
            latents=torch.from_numpy(saved["draws"][0]),
            height=saved["image"].shape[0],
            width=saved["image"].shape[1],
            output_type="np",
            **negative,
        ).images[0]


def diffusers(place: Path, case: dict[str, Any], saved: Any) -> np.ndarray:
    """diffusers reads torch weights: the model's own folder, with the scheduler that the bundle carries."""
    from diffusers import StableDiffusionPipeline

    folder = place / "for-diffusers"
    shutil.copytree(place / "pipeline", folder, dirs_exist_ok=True)
    shutil.copytree(place / "bundle/scheduler", folder / "scheduler", dirs_exist_ok=True)
    shutil.copytree(
        place / "bundle/tokenizer", folder / "tokenizer", dirs_exist_ok=True
    )  # in transformers 4's files too
    shutil.copy(place / "bundle/model_index.json", folder / "model_index.json")
    return like_diffusers(StableDiffusionPipeline.from_pretrained(folder), case, saved)


def attached(place: Path, case: dict[str, Any], saved: Any) -> np.ndarray:
    """The same pipeline of diffusers, on the compiled networks of the bundle."""
    from diffusers import StableDiffusionPipeline

    import accel

    pipe = StableDiffusionPipeline.from_pretrained(place / "for-diffusers")
    with accel.attach(pipe, place / "bundle", engine="onnxruntime"):
        return like_diffusers(pipe, case, saved)


def optimum(place: Path, case: dict[str, Any], saved: Any) -> np.ndarray:
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    return like_diffusers(ORTStableDiffusionPipeline.from_pretrained(place / "bundle"), case, saved)


def optimum_from_hub(place: Path, case: dict[str, Any], saved: Any) -> np.ndarray:
    from optimum.onnxruntime import ORTDiffusionPipeline

    return like_diffusers(ORTDiffusionPipeline.from_pretrained(f"someone/{place.name}"), case, saved)


def optimum_intel(place: Path, case: dict[str, Any], saved: Any) -> np.ndarray:
    from optimum.intel import OVDiffusionPipeline

    how = dict(ov_config={"INFERENCE_PRECISION_HINT": "f32", "CACHE_DIR": ""}, compile=False)
    pipe = OVDiffusionPipeline.from_pretrained(place / "genai", **how)
    return like_diffusers(pipe, case, saved)


def genai(place: Path, case: dict[str, Any], saved: Any) -> np.ndarray:
    import openvino
    import openvino_genai

    draws = iter(saved["draws"])

    class Ours(openvino_genai.Generator):
        def randn_tensor(self, shape: Any) -> Any:
            return openvino.Tensor(np.ascontiguousarray(next(draws)).reshape(tuple(shape)))

        def next(self) -> float:
            raise AssertionError("noise is drawn as whole tensors")

    pipe = openvino_genai.Text2ImagePipeline(str(place / "genai"), "CPU", INFERENCE_PRECISION_HINT="f32")
    height, width = saved["image"].shape[:2]
    negative = {"negative_prompt": case["negative"]} if "negative" in case else {}
    call = dict(num_inference_steps=int(saved["steps"]), guidance_scale=float(saved["guidance"]))
    made = pipe.generate(case["prompt"], height=height, width=width, generator=Ours(), **call, **negative)
    return (made.data[0].astype(np.float32) + 0.5) / 255  # its 8 bits are cut off, not rounded


# The other way round: a folder of another exporter, drawn by its library and by accel


def optimum_export(place: Path) -> None:
    from optimum.exporters.onnx import main_export

    how = dict(task="text-to-image", library_name="diffusers", do_validation=False)
    main_export(str(place / "for-diffusers"), str(place / "theirs-onnx"), **how)


def optimum_intel_export(place: Path) -> None:
    from optimum.intel import OVDiffusionPipeline

    how = dict(export=True, compile=False, load_in_8bit=False)
    OVDiffusionPipeline.from_pretrained(place / "for-diffusers", **how).save_pretrained(place / "theirs-openvino")


def optimum_own(place: Path, case: dict[str, Any], saved: Any) -> np.ndarray:
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    optimum_export(place)
    image = like_diffusers(ORTStableDiffusionPipeline.from_pretrained(place / "theirs-onnx"), case, saved)
    np.save(place / "theirs-onnx.npy", image)
    return saved["image"]


def optimum_intel_own(place: Path, case: dict[str, Any], saved: Any) -> np.ndarray:
    from optimum.intel import OVDiffusionPipeline

    optimum_intel_export(place)
    how = dict(ov_config={"INFERENCE_PRECISION_HINT": "f32", "CACHE_DIR": ""}, compile=False)
    pipe = OVDiffusionPipeline.from_pretrained(place / "theirs-openvino", **how)
    np.save(place / "theirs-openvino.npy", like_diffusers(pipe, case, saved))
    return saved["image"]


def theirs_in_accel(kind: str, engine: str) -> Callable[..., np.ndarray]:
    """Our image from their folder; the difference is taken from theirs, so the reference is moved by it."""

    def draw(place: Path, case: dict[str, Any], saved: Any) -> np.ndarray:
        import accel

        with accel.load(place / f"theirs-{kind}", engine=engine) as pipe:
            how = dict(sampler="lcm" if int(saved["steps"]) == 4 else "ddim")
            how |= dict(steps=int(saved["steps"]), guidance_scale=float(saved["guidance"]))
            found = ours(pipe, case, saved["draws"], **how)
        return saved["image"] + (found - np.load(place / f"theirs-{kind}.npy"))

    return draw


# name -> (what it reads, environment, how)
RUNTIMES: dict[str, tuple[str, str, Callable[..., np.ndarray]]] = {
    "accel, eager torch": ("the bundle", ".venv", accel_engine("eager")),
    "accel, OpenVINO": ("the bundle", ".venv", accel_engine("openvino")),
    "accel.AccelPipeline": ("a name of the hub", ".venv", accel_from_hub),
    "diffusers ModularPipeline": ("a name of the hub, with accel installed", ".venv", modular),
    "diffusers": ("the model's own folder, the bundle's scheduler", ".venv", diffusers),
    "diffusers with accel.attach": ("the same, and the bundle", ".venv", attached),
    "optimum-onnx": ("the bundle", ".venv-optimum", optimum),
    "optimum-onnx, hub": ("a name of the hub", ".venv-optimum", optimum_from_hub),
    "OpenVINO GenAI": ("--target openvino-genai", ".venv-openvino", genai),
    "optimum-intel": ("--target openvino-genai", ".venv-openvino", optimum_intel),
    THEIRS[0]: ("its own export (the comparison below)", ".venv-optimum", optimum_own),
    "accel, ONNX Runtime, optimum's folder": ("optimum-onnx' export", ".venv", theirs_in_accel("onnx", "onnxruntime")),
    "accel, OpenVINO, optimum's folder": ("optimum-onnx' export", ".venv", theirs_in_accel("onnx", "openvino")),
    THEIRS[1]: ("its own export (the comparison below)", ".venv-openvino", optimum_intel_own),
    "accel, OpenVINO, optimum-intel's folder": (
        "optimum-intel's export",
        ".venv",
        theirs_in_accel("openvino", "openvino"),
    ),
}


def draw(runtime: str, place: Path) -> None:
    """In the environment of a runtime: the largest difference from the reference, printed as JSON."""
    saved = np.load(place / "ours.npz")
    found = np.asarray(RUNTIMES[runtime][2](place, CASES[place.name], saved), np.float32)
    installed = {}
    for name in PACKAGES.split():
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    difference = float(np.abs(found - saved["image"]).max() * 255)
    print(json.dumps({"of_255": round(difference, 4), "packages": installed}))


def asked(runtime: str, place: Path, url: str) -> dict[str, Any]:
    """What `draw` prints, or why it did not."""
    python = ROOT / RUNTIMES[runtime][1] / "bin/python"
    if not python.exists():
        return {"failed": f"{RUNTIMES[runtime][1]} is not there"}
    cache = {"HF_HOME": str(place.parent / "hub-cache"), "ACCEL_CACHE": str(place.parent / "accel-cache")}
    env = os.environ | cache | {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [python, __file__, "draw", runtime, str(place)], env=env, capture_output=True, text=True, timeout=1200
    )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measured(folder: Path, only: list[str]) -> dict[str, Any]:
    """The document: what each runtime draws of each model."""
    hub = load("hub", "tests/fakes/hub.py").Hub()
    push = ("import sys, accel; accel.push(sys.argv[1], sys.argv[2], licence='apache-2.0')",)
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": sys.modules["hub"].TOKEN, "HF_HUB_OFFLINE": "0"}
    for name in CASES:
        arguments = [sys.executable, "-c", *push, str(folder / name / "bundle"), f"someone/{name}"]
        subprocess.run(arguments, env=env | {"HF_HUB_DISABLE_XET": "1"}, check=True, capture_output=True)
    rows = []
    for runtime, (reads, _, _) in RUNTIMES.items():
        if only and runtime not in only:
            continue
        found = {name: asked(runtime, folder / name, hub.url) for name in CASES}
        packages: dict[str, str] = {}
        for entry in found.values():
            packages |= entry.pop("packages", {})
        rows.append({"runtime": runtime, "reads": reads, "images": found, "packages": packages})
        print(runtime, {name: entry.get("of_255", entry.get("failed")) for name, entry in found.items()}, flush=True)
    hub.close()
    return {
        "command": "bash benchmarks/runtimes.sh out/runtimes --write",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        "reference": "accel on ONNX Runtime, float32, 64 px; largest difference of a pixel, in 1/255",
        "cases": {name: case["what"] for name, case in CASES.items()},
        "rows": rows,
    }


def table(document: dict[str, Any]) -> str:
    """The rows as Markdown, and the versions under them."""
    names = list(document["cases"])
    lines = ["| runtime | reads | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for row in document["rows"]:
        if row["runtime"] in THEIRS:  # they make what the rows below them read
            continue
        images = [row["images"][name] for name in names]
        cells = [f"{one['of_255']:.4f}" if "of_255" in one else "no" for one in images]
        lines.append(f"| {row['runtime']} | {row['reads']} | {' | '.join(cells)} |")
    packages = {f"{name} {value}" for row in document["rows"] for name, value in row["packages"].items()}
    cases = "; ".join(f"{name}: {what}" for name, what in document["cases"].items())
    return "\n".join([*lines, "", f"{cases}. {', '.join(sorted(packages))}."])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", action="append", default=[], metavar="RUNTIME")
    parser.add_argument("--write", action="store_true", help="write benchmarks/runtimes.json and docs/runtimes.md")
    args = parser.parse_args()
    if not (args.out / "guided/ours.npz").exists():
        make(args.out)
    document = measured(args.out, args.only)
    if args.write:
        (ROOT / "benchmarks/runtimes.json").write_text(json.dumps(document, indent=2) + "\n")
        load("pages", "benchmarks/pages.py").put(ROOT / "docs/runtimes.md", "runtimes", table(document))
    images = [entry for row in document["rows"] for entry in row["images"].values()]
    return int(any(entry.get("of_255", 256.0) >= 1 for entry in images))


if __name__ == "__main__":
    if sys.argv[1] == "draw":
        draw(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main())
