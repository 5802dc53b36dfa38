"""Does optimum's own pipeline load our bundle and make our image? Run by optimum_interop.sh, in two environments.

python optimum_interop.py ours   BUNDLE FOLDER    with accel: latents and the reference image
python optimum_interop.py theirs BUNDLE FOLDER    with optimum-onnx: the same latents through its own pipeline
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

PROMPT, STEPS, GUIDANCE = "a handwritten seven", 10, 4.0


def ours(bundle: Path, folder: Path) -> None:
    import accel

    pipe = accel.load(bundle, engine="onnxruntime")
    constants = pipe.bundle.manifest.pipeline
    side = constants["native_size"] // constants["vae_scale"]
    latents = np.random.default_rng(0).standard_normal((1, constants["latent_channels"], side, side), dtype=np.float32)
    result = pipe(PROMPT, sampler="ddim", steps=STEPS, guidance_scale=GUIDANCE, latents=latents, output_type="np")
    np.savez(folder / "ours.npz", latents=latents, image=result.images[0])


def theirs(bundle: Path, folder: Path) -> None:
    import torch
    from diffusers import DDIMScheduler
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    saved = np.load(folder / "ours.npz")
    pipe = ORTStableDiffusionPipeline.from_pretrained(bundle)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    image = pipe(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(saved["latents"]),
        height=saved["image"].shape[0],
        width=saved["image"].shape[1],
        output_type="np",
    ).images[0]
    difference = float(np.abs(image - saved["image"]).max() * 255)
    print(json.dumps({"largest difference in 1/255": difference, "same image": difference < 1}))
    sys.exit(difference >= 1)


if __name__ == "__main__":
    {"ours": ours, "theirs": theirs}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
