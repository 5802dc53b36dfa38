"""A bundle, called like a diffusers pipeline.

python examples/pipeline.py out/digits-bundle
"""

import sys

import accel

if len(sys.argv) < 2:
    raise SystemExit(__doc__)
pipe = accel.load(sys.argv[1], engine="auto")
result = pipe(["a handwritten seven", "a handwritten three"], seed=0)
for i, image in enumerate(result.images):
    image.resize((256, 256)).save(f"pipeline-{i}.png")
print(pipe.engines["unet"].description, result.seconds)
