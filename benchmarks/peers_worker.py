"""One library that draws Stable Diffusion images, as a process of its own that draws when it is told: see peers.py.

    python benchmarks/peers_worker.py prepare optimum-onnx WORK      # writes WORK/optimum-onnx, which a library reads
    python benchmarks/peers_worker.py serve optimum-onnx WORK --size 256 --steps 4 --threads 2

A process that serves loads its model, draws once, prints `ready` and a JSON object, and then answers each line `draw`
with the seconds of one image, from text to pixels. `save FILE` writes the image as float32 [h, w, 3] in 0..1. Every
library starts from the same weights and, where its interface takes noise, from the same noise (WORK/noise-SIZE.npy);
DDIM, no guidance. Libraries are imported where they are used: each is installed in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "a fox in the snow"
Draw = Callable[[], np.ndarray]


def noise(work: Path, size: int) -> np.ndarray:
    return np.load(work / f"noise-{size}.npy")


# ---- diffusers and what has its interface


def _diffusers_like(pipe: Any, work: Path, size: int, steps: int) -> Draw:
    import torch

    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(noise(work, size)).to(getattr(pipe, "dtype", torch.float32))
    call = dict(num_inference_steps=steps, guidance_scale=0.0, height=size, width=size, output_type="np")
    return lambda: pipe(PROMPT, latents=latents.clone(), **call).images[0]


def diffusers(work: Path, size: int, steps: int, *, compiled: bool = False, dtype: str = "float32") -> Draw:
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(work / "pipeline", torch_dtype=getattr(torch, dtype))
    if compiled:
        pipe.unet = torch.compile(pipe.unet)
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    return _diffusers_like(pipe, work, size, steps)


def prepare_optimum_onnx(work: Path) -> None:
    from optimum.exporters.onnx import main_export

    main_export(str(work / "pipeline"), work / "optimum-onnx", task="text-to-image", library_name="diffusers")


def optimum_onnx(work: Path, size: int, steps: int) -> Draw:
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    pipe = ORTStableDiffusionPipeline.from_pretrained(work / "optimum-onnx", session_options=_ort_options())
    return _diffusers_like(pipe, work, size, steps)


def _ort_options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    return options


def prepare_optimum_intel(work: Path, *, out: str = "optimum-intel", precision: str = "fp32") -> None:
    """float32; weights in int8; or the UNet in full int8 as optimum-intel does it, calibrated on our prompts."""
    from optimum.intel import OVQuantizationConfig, OVStableDiffusionPipeline, OVWeightQuantizationConfig

    prompts = [line for line in (work / "prompts.txt").read_text().splitlines() if line][:32]
    how = {
        "fp32": {"load_in_8bit": False},
        "int8-weights": {"quantization_config": OVWeightQuantizationConfig(bits=8)},
        "int8": {"quantization_config": OVQuantizationConfig(bits=8, dataset=prompts, num_samples=64)},
    }[precision]
    source = work / ("pipeline-256" if precision == "int8" else "pipeline")  # its calibration draws the native size
    OVStableDiffusionPipeline.from_pretrained(source, export=True, compile=False, **how).save_pretrained(work / out)


def optimum_intel(
    work: Path, size: int, steps: int, *, folder: str = "optimum-intel", hint: str = "f32", tiny: bool = False
) -> Draw:
    from optimum.intel import OVStableDiffusionPipeline

    config = {"INFERENCE_NUM_THREADS": os.environ["OMP_NUM_THREADS"], "INFERENCE_PRECISION_HINT": hint}
    pipe = OVStableDiffusionPipeline.from_pretrained(work / folder, ov_config=config, compile=False)
    pipe.reshape(-1, size, size, -1)  # a number of images would be doubled, for guidance
    pipe.compile()
    return _with_tiny_decoder(pipe, work, size, steps, config) if tiny else _diffusers_like(pipe, work, size, steps)


def _with_tiny_decoder(pipe: Any, work: Path, size: int, steps: int, config: dict[str, str]) -> Draw:
    """FastSD CPU's recipe: the pipeline on OpenVINO, its latents decoded by a tiny VAE on OpenVINO."""
    import openvino
    import torch
    from diffusers import AutoencoderTiny

    decoder = AutoencoderTiny.from_pretrained(work / "tiny-vae").eval().decoder
    made = openvino.convert_model(decoder, example_input=torch.zeros(1, 4, size // 8, size // 8))
    request = openvino.compile_model(made, "CPU", config).create_infer_request()
    latents = torch.from_numpy(noise(work, size))
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=steps, guidance_scale=0.0, height=size, width=size, output_type="latent")

    def draw() -> np.ndarray:
        found = pipe(PROMPT, latents=latents.clone(), **call).images
        image = request.infer([np.asarray(found, np.float32)])[0]
        return ((image[0] + 1) / 2).clip(0, 1).transpose(1, 2, 0)

    return draw


# ---- OpenVINO GenAI


def genai(work: Path, size: int, steps: int, *, folder: str, hint: str = "f32") -> Draw:
    import openvino
    import openvino_genai

    latents = noise(work, size)

    class Ours(openvino_genai.Generator):
        def randn_tensor(self, shape: Any) -> Any:
            return openvino.Tensor(np.ascontiguousarray(latents).reshape(tuple(shape)))

        def next(self) -> float:
            raise AssertionError("noise is drawn as whole tensors")

    pipe = openvino_genai.Text2ImagePipeline(str(work / folder))
    pipe.reshape(1, size, size, 1.0)
    threads = int(os.environ["OMP_NUM_THREADS"])
    pipe.compile("CPU", INFERENCE_PRECISION_HINT=hint, INFERENCE_NUM_THREADS=threads)
    call = dict(num_inference_steps=steps, guidance_scale=0.0, height=size, width=size)

    def draw() -> np.ndarray:
        made = pipe.generate(PROMPT, generator=Ours(), **call)
        return (made.data[0].astype(np.float32) + 0.5) / 255  # its 8 bits are cut off, not rounded

    return draw


def prepare_genai(work: Path, *, folder: str) -> None:
    """optimum-intel's export, with its tokenizer as a graph and a scheduler config in OpenVINO GenAI's words."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import CLIPTokenizer

    out, source = work / folder, folder.replace("genai", "optimum-intel")
    if not (work / source).is_dir():
        prepare_optimum_intel(work, out=source, precision=source.removeprefix("optimum-intel-"))
    shutil.copytree(work / source, out, dirs_exist_ok=True)
    made = convert_tokenizer(CLIPTokenizer.from_pretrained(out / "tokenizer"), with_detokenizer=False)
    openvino.save_model(made, out / "tokenizer" / "openvino_tokenizer.xml")


# ---- stable-diffusion.cpp


def sd_cpp(work: Path, size: int, steps: int, *, kind: str) -> Draw:
    from stable_diffusion_cpp import StableDiffusion

    threads = int(os.environ["OMP_NUM_THREADS"])
    pipe = StableDiffusion(model_path=str(work / "pipeline"), wtype=kind, n_threads=threads, verbose=False)
    call = dict(width=size, height=size, sample_steps=steps, cfg_scale=1.0, sample_method="euler", seed=7)

    def draw() -> np.ndarray:
        return np.asarray(pipe.generate_image(prompt=PROMPT, **call)[0], np.float32) / 255

    return draw


# ---- accel


def accel(work: Path, size: int, steps: int, *, bundle: str, engine: str, **options: Any) -> Draw:
    import accel as ours

    options |= dict(threads=int(os.environ["OMP_NUM_THREADS"]), text_cache=0)  # the peers encode every prompt, too
    pipe = ours.load(work / bundle, engine=engine, **options)
    latents = noise(work, size)
    call = dict(steps=steps, guidance_scale=0.0, height=size, width=size, sampler="ddim", output_type="np")
    return lambda: pipe(PROMPT, latents=latents, **call).images[0]


# Name -> (how it draws, its options). "bf16": in bfloat16 what is not int8, which OpenVINO chooses by itself on a CPU
# that has it; the other rows are asked for float32.
PEERS: dict[str, tuple[Callable[..., Draw], dict[str, Any]]] = {
    "diffusers eager": (diffusers, {}),
    "diffusers torch.compile": (diffusers, {"compiled": True}),
    "diffusers bf16": (diffusers, {"dtype": "bfloat16"}),
    "optimum-onnx": (optimum_onnx, {}),
    "optimum-intel": (optimum_intel, {}),
    "optimum-intel int8": (optimum_intel, {"folder": "optimum-intel-int8"}),
    "optimum-intel int8 bf16": (optimum_intel, {"folder": "optimum-intel-int8", "hint": "bf16"}),
    "optimum-intel int8 bf16 tiny decoder": (
        optimum_intel,
        {"folder": "optimum-intel-int8", "hint": "bf16", "tiny": True},
    ),
    "OpenVINO GenAI": (genai, {"folder": "genai"}),
    "OpenVINO GenAI bf16": (genai, {"folder": "genai", "hint": "bf16"}),
    "OpenVINO GenAI int8 weights": (genai, {"folder": "genai-int8-weights"}),
    "OpenVINO GenAI int8": (genai, {"folder": "genai-int8"}),
    "OpenVINO GenAI int8 bf16": (genai, {"folder": "genai-int8", "hint": "bf16"}),
    "stable-diffusion.cpp f32": (sd_cpp, {"kind": "f32"}),
    "stable-diffusion.cpp q8_0": (sd_cpp, {"kind": "q8_0"}),
    "accel ONNX Runtime": (accel, {"bundle": "ours/fp32", "engine": "onnxruntime"}),
    "accel OpenVINO": (accel, {"bundle": "ours/fp32", "engine": "openvino"}),
    "accel OpenVINO bf16": (accel, {"bundle": "ours/fp32", "engine": "openvino", "dtype": "bf16"}),
    "accel ONNX Runtime int8": (accel, {"bundle": "ours/int8", "engine": "onnxruntime"}),
    "accel OpenVINO int8": (accel, {"bundle": "ours/int8", "engine": "openvino"}),
    "accel OpenVINO int8 bf16": (accel, {"bundle": "ours/int8", "engine": "openvino", "dtype": "bf16"}),
    "accel OpenVINO int8 bf16 tiny decoder": (
        accel,
        {"bundle": "ours/int8-tiny", "engine": "openvino", "dtype": "bf16"},
    ),
}
# A folder of WORK -> how it is written.
PREPARED: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "optimum-onnx": (prepare_optimum_onnx, {}),
    "optimum-intel": (prepare_optimum_intel, {}),
    "optimum-intel-int8": (prepare_optimum_intel, {"out": "optimum-intel-int8", "precision": "int8"}),
    "genai": (prepare_genai, {"folder": "genai"}),
    "genai-int8-weights": (prepare_genai, {"folder": "genai-int8-weights"}),
    "genai-int8": (prepare_genai, {"folder": "genai-int8"}),
}


def folder_of(name: str) -> str:
    """The entry of `PREPARED` that a peer reads; "" if it reads the pipeline itself, or a bundle."""
    found = PEERS[name][1].get("folder") or name
    return found if found in PREPARED else ""


def serve(name: str, work: Path, size: int, steps: int) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries talk on standard output
    load, options = PEERS[name]
    began = time.perf_counter()
    draw = load(work, size, steps, **options)
    loaded = time.perf_counter()
    image = draw()
    first = time.perf_counter() - loaded
    print("ready", json.dumps({"load_s": loaded - began, "first_s": first}), file=answers)
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "save":
            np.save(rest, np.asarray(image, np.float32))
            print("saved", file=answers)
        elif word == "draw":
            began = time.perf_counter()
            image = draw()
            print(time.perf_counter() - began, file=answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prepare", "serve"))
    parser.add_argument("name", choices=(*PEERS, *PREPARED))
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.what == "serve":
        serve(args.name, args.work, args.size, args.steps)
    else:
        make, options = PREPARED[args.name]
        make(args.work, **options)


if __name__ == "__main__":
    main()
