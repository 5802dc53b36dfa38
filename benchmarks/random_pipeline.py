"""A real-size pipeline with random weights: what speed, memory and parity are measured on where no weights are at hand.

    python benchmarks/random_pipeline.py sd15-tiny out/sd15-tiny-random

Speed and parity do not depend on what the weights have learned; picture quality of course does, and is not measured
on these. Text encoder and VAE have Stable Diffusion 1.5's sizes, the UNet that of the named topology. The tokenizer is
the digits model's, whose ids are a subset of CLIP's range.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from accel.topology import topology

ASSETS = Path(__file__).parents[1] / "accel" / "assets" / "digits" / "teacher"


def build(name: str, seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x pipeline with random weights; `name` is a topology of family sd1."""
    chosen = topology(name)
    assert chosen.family == "sd1", "this script knows the text encoder of Stable Diffusion 1.x only"
    torch.manual_seed(seed)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=512,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, projection_dim=768,
        )),
        tokenizer=CLIPTokenizer.from_pretrained(ASSETS / "tokenizer"),
        unet=UNet2DConditionModel(**chosen.config),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
            set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build(args.topology, args.seed).save_pretrained(args.out)
