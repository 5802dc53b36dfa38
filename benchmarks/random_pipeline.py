"""A real-size pipeline with random weights: what speed, memory and parity are measured on where no weights are at hand.

    python benchmarks/random_pipeline.py sd15-tiny out/sd15-tiny-random

Speed, memory and parity do not depend on what the weights have learned; image quality does, and is not measured on
these. Text encoders and VAE have the sizes of Stable Diffusion 1.5 or SDXL, the UNet is the named topology. The
tokenizer is the digits model's, whose ids are within CLIP's range. Networks are built and written one by one, so
SDXL needs no more memory than its UNet in float32 (10.3 GB).
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from accel.assets import DIGITS
from accel.models.topology import Topology, topology

_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def _vae(size: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=size,
        scaling_factor=0.13025 if size == 1024 else 0.18215,
    )


def _clip_l() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, projection_dim=768
        )
    )


def _clip_big_g() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_attention_heads=20,
            num_hidden_layers=32,
            projection_dim=1280,
            hidden_act="gelu",
        )
    )


def parts(chosen: Topology) -> Iterator[tuple[str, str, Callable]]:
    """(component, library, builder) of a pipeline around this UNet."""
    xl = chosen.family == "sdxl"
    yield "unet", "diffusers", lambda: UNet2DConditionModel(**chosen.config)
    yield "vae", "diffusers", lambda: _vae(1024 if xl else 512)
    yield "text_encoder", "transformers", _clip_l
    if xl:
        yield "text_encoder_2", "transformers", _clip_big_g
        yield "scheduler", "diffusers", lambda: EulerDiscreteScheduler(timestep_spacing="leading", **_SCHEDULE)
    else:
        yield "scheduler", "diffusers", lambda: PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **_SCHEDULE)


def _as_published(file: Path) -> None:
    """Name a CLIP text encoder's weights as published folders do: transformers 5 leaves their prefix out, and older
    versions then make up random ones."""
    tensors = load_file(file)
    save_file(
        {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in tensors.items()},
        file,
        {"format": "pt"},
    )


def write(name: str, out: Path, seed: int = 0, *, weights: bool = True) -> None:
    """Write the pipeline folder; `name` is a topology of family sd1 or sdxl. Without weights: the configs alone."""
    chosen = topology(name)
    assert chosen.family in ("sd1", "sdxl"), "SD2's text encoder is not built here"
    torch.manual_seed(seed)
    xl = chosen.family == "sdxl"
    index: dict = {"_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"}
    for component, library, build in parts(chosen):
        whole = weights or component == "scheduler"
        with torch.device("cpu" if whole else "meta"):
            model = build()
        if whole:
            model.save_pretrained(out / component)
            if library == "transformers":
                _as_published(out / component / "model.safetensors")
        else:
            save_config = model.config.save_pretrained if library == "transformers" else model.save_config
            save_config(out / component)
        index[component] = [library, type(model).__name__]
        del model
        gc.collect()
    for component in ("tokenizer", "tokenizer_2") if xl else ("tokenizer",):
        shutil.copytree(DIGITS / "teacher" / "tokenizer", out / component, dirs_exist_ok=True)
        index[component] = ["transformers", "CLIPTokenizer"]
    (out / "model_index.json").write_text(json.dumps(index, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology", help="sd15, sd15-base, sd15-small, sd15-tiny, sdxl, ssd-1b, vega")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.topology, args.out, args.seed)
