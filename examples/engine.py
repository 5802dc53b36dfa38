"""One network of a bundle on any engine: tensors in, tensors out. The manifest says what goes in.

python examples/engine.py out/digits-bundle onnxruntime
"""

import sys

import numpy as np

import accel

if len(sys.argv) < 2:
    raise SystemExit(__doc__)
bundle, engine = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "auto"
unet = accel.load_engine(bundle, "unet", engine=engine)
for spec in unet.component.inputs:
    print("takes", spec.name, spec.dtype, spec.shape)

rng = np.random.default_rng(0)
sizes = {name: limits.min for name, limits in unet.component.dims.items()}
feeds = {
    spec.name: np.asarray(rng.standard_normal(spec.concrete(sizes)), dtype=spec.dtype) for spec in unet.component.inputs
}
feeds["timestep"] = np.float32(500)
out = unet(**feeds)["out_sample"]
print(unet.description, "->", tuple(out.shape))
