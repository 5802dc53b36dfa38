"""An existing diffusers pipeline, sped up in one line, and restored afterwards.

python examples/attach.py digits out/digits-bundle      (or your own pipeline folder and its bundle)
"""

import sys

import torch
from diffusers import StableDiffusionPipeline

import accel
from accel.assets import resolve

if len(sys.argv) < 3:
    raise SystemExit(__doc__)
pipe = StableDiffusionPipeline.from_pretrained(resolve(sys.argv[1]))
attached = accel.attach(pipe, sys.argv[2])
image = pipe("a handwritten seven", num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images[0]
image.resize((256, 256)).save("attached.png")
print({name: engine.description for name, engine in attached.engines.items()})
attached.detach()
