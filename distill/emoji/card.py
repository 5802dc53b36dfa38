"""The model card of the emoji teacher."""

from __future__ import annotations

from typing import Any

STAGES = {"judge": "judge", "text": "text encoder", "vae": "VAE", "unet": "UNet"}


def model_card(quality: dict[str, Any]) -> str:
    """README.md of the pipeline folder, from what `quality.json` holds."""
    settings, real = quality["settings"], quality["real"]
    counts = "\n".join(f"| {name.replace('_', ' ')} | {count:,} |" for name, count in quality["parameters"].items())
    stages = "\n".join(
        f"| {title} | {quality['steps'][name]:,} | {quality['seconds'][name] / 60:.0f} |"
        for name, title in STAGES.items()
    )
    trials = "\n".join(
        f"| {trial['guidance']} | {trial['images']} | {trial['prompt_accuracy']:.1%} "
        f"| {trial['frechet_distance']:.3f} |"
        for trial in quality["guidance_trials"]
    )
    rows = "\n".join(
        f"| {title} | {quality[name]:.1%} | {real[name]:.1%} |"
        for name, title in {
            "prompt_accuracy": "prompt accuracy",
            "prompt_accuracy_held_out": "the same of pairs of emoji and background that training never had",
            "background_accuracy": "background accuracy",
        }.items()
        if name in quality and name in real
    )
    hours = f" --hours {quality['hours']:g}" if quality["hours"] else ""
    looks = quality["steps"]["unet"] * settings["batch"] / quality["emoji"]
    return f"""---
pipeline_tag: text-to-image
library_name: diffusers
---

# Emoji teacher

A small Stable Diffusion in colour: the graph of Stable Diffusion 1.5 with narrow channels, trained from nothing on the
emoji of Noto Color Emoji to predict v. It draws 64x64 images for prompts such as "a red heart", "a cat with a smile" or
"a rocket on a black background". It exists so that distillation, export and every engine can be tried on a
model whose images are worth looking at, without a download.

```python
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("teacher")
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe("a red heart", height=64, width=64, num_inference_steps=25, guidance_scale={quality["guidance"]})
```

## Data

{quality["emoji"]:,} emoji of Noto Color Emoji (Google and contributors), in {quality["training_images"]:,} images:
moved, scaled, on ten backgrounds, some turned round where that means the same. Captions are made of the short names of
Unicode's CLDR, the short codes of the Python package `emoji` (BSD licence), and the names of Unicode's characters.

Licence facts, from the copyright file of Debian's package fonts-noto-color-emoji: the font files are under the SIL Open
Font License 1.1, everything else of the noto-emoji project under Apache-2.0. The OFL says that its "requirement for
fonts to remain under this license does not apply to any document created using the fonts"; of models it says nothing.
No file of the font is in this folder.

## Training

`python -m accel.distill.emoji.train{hours}`, on {quality["threads"]} CPU threads, \
{sum(quality["seconds"].values()) / 3600:.1f} h together; the UNet has looked at each emoji {looks:.0f} times.

| stage | steps | minutes |
|---|---|---|
{stages}

| part | parameters |
|---|---|
{counts}

Weights are stored in half precision; the configs ask for full precision on loading. The VAE keeps held-out drawings to
{quality["vae_psnr"]:.1f} dB.

## Figures

{quality["images"]} images, {quality["sampler"]}, guidance {quality["guidance"]}; measured on the stored weights, as
`accel evaluate --protocol emoji` does.

| | this | real drawings |
|---|---|---|
{rows}
| Frechet distance to held-out drawings | {quality["frechet_distance"]:.3f} | {real["frechet_distance"]:.3f} |

Prompt accuracy: the share of images whose own prompt is the nearest of {quality["prompts"]}, in the eyes of the judge
beside this folder, which was trained on other draws; guessing gets {1 / quality["prompts"]:.1%}. The Frechet distance
(Heusel et al. 2017) is taken in the judge's features, so it compares with no figure from elsewhere. The guidance
scale was chosen on other seeds:

| guidance | images | prompt accuracy | Frechet distance |
|---|---|---|---|
{trials}

## Limits

It knows what the font draws, and the words of its captions. It composes a known emoji with a known background; of two
things in one prompt it draws one, and lettering, clocks and flags with fine signs are approximate.
"""
