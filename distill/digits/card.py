"""The model card of the digits teacher, and a contact sheet of digits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from accel.bench.contact_sheet import contact_sheet

from ..from_nothing.parts import parameters
from ..sources.digits import SIZE, WORDS, pixels


def model_card(pipeline: Any, classifier: nn.Module, settings: Any, quality: dict[str, Any]) -> str:
    """README.md of the pipeline folder; `settings` is a dataclass whose fields are the command's options."""
    parts = {"UNet": pipeline.unet, "text encoder": pipeline.text_encoder, "VAE": pipeline.vae}
    parts |= {"classifier": classifier}
    counts = "\n".join(f"| {name} | {parameters(model):,} |" for name, model in parts.items())
    trials = "\n".join(
        f"| {trial['guidance']} | {trial['images']} | {trial['prompt_accuracy']:.1%} "
        f"| {trial['frechet_distance']:.2f} |"
        for trial in quality["guidance_trials"]
    )
    times = ", ".join(f"{name} {value / 60:.1f} min" for name, value in quality["seconds"].items())
    options = " ".join(
        f"--{field.name.replace('_', '-')} {getattr(settings, field.name)}"
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default
    )
    command = f"python -m accel.distill.digits.train {options}".rstrip()
    return f"""---
pipeline_tag: text-to-image
library_name: diffusers
---

# Digits teacher

A Stable Diffusion pipeline in miniature: the graph of Stable Diffusion 1.5 with narrow channels, trained from nothing
on handwritten digits to predict v. It draws 64x64 images for prompts such as "a handwritten seven" or "a photo of
the digit 7". It exists so that distillation, export and every engine can be tried and tested in seconds, without a
download.

```python
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("teacher")
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe("a handwritten seven", height=64, width=64, num_inference_steps=25, guidance_scale={quality["guidance"]})
```

## Data

scikit-learn's `load_digits`: 1,797 grey 8x8 images, the test part of *Optical Recognition of Handwritten Digits*
(E. Alpaydin, C. Kaynak, 1998, UCI Machine Learning Repository, doi 10.24432/C50P49), licensed CC BY 4.0. Changed:
framed, enlarged to 64x64, contrast raised. 1,297 images train; 500, 50 of each digit, are held out and only measure.

## Training

`{command}`

On {quality["threads"]} CPU threads: {times}; {sum(quality["seconds"].values()) / 60:.0f} min together. \
UNet and text encoder: {settings.steps} steps of {settings.batch}, VAE: {settings.vae_steps} steps of \
{settings.vae_batch}.

| part | parameters |
|---|---|
{counts}

Weights are stored in half precision; the configs ask for full precision on loading.

## Figures

{quality["images"]} images, {quality["sampler"]}, guidance {quality["guidance"]}; measured on the stored weights.

| | |
|---|---|
| prompt accuracy | {quality["prompt_accuracy"]:.1%} |
| Frechet distance to 500 held-out real images | {quality["frechet_distance"]:.2f} |
| the same for 500 real training images (the floor) | {quality["frechet_floor"]:.2f} |
| classifier accuracy on the held-out images | {quality["classifier_accuracy_held_out"]:.1%} |

The Frechet distance (Heusel et al. 2017) is taken in the 64 penultimate features of the classifier that ships beside
this folder, so it compares with no figure from elsewhere. The guidance scale was chosen on other seeds:

| guidance | images | prompt accuracy | Frechet distance |
|---|---|---|---|
{trials}

## Limits

It knows ten digits and about thirty words. Anything else gives some digit or a blot.
"""


def digit_sheet(images: torch.Tensor) -> Any:
    """A contact sheet of images [n, 3, 64, 64] in -1..1 of the digits 0 to 9 in turn, n a multiple of ten; PIL."""
    rows = pixels(images).reshape(-1, 10, SIZE, SIZE, 3)
    return contact_sheet({f"{number + 1}": row for number, row in enumerate(rows)}, WORDS, cell=SIZE)
