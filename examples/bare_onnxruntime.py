"""A bundle without accel, torch or diffusers: everything an embedding app needs is in the folder.

    python examples/bare_onnxruntime.py out/digits-bundle "a handwritten seven" bare.png

Needs numpy, onnxruntime, tokenizers and pillow. The sampler is DDIM, written out: it is twelve lines, and its constants
come from the bundle's own scheduler config and manifest.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

if len(sys.argv) < 4:
    raise SystemExit(__doc__)
bundle, prompt, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
manifest = json.loads((bundle / "accel.json").read_text())
constants, guidance = manifest["pipeline"], manifest["sampler"]["guidance"]
sessions = {
    name: onnxruntime.InferenceSession(bundle / manifest["components"][name]["graph"])
    for name in ("text_encoder", "unet", "vae_decoder")
}

# Text: the prompt and the empty prompt, padded to 77 tokens, in one batch.
tokenizer = Tokenizer.from_file(str(bundle / "tokenizer" / "tokenizer.json"))
end = tokenizer.token_to_id("<|endoftext|>")
tokenizer.enable_padding(length=77, pad_id=end)
tokenizer.enable_truncation(77)
ids = np.array([encoding.ids for encoding in tokenizer.encode_batch(["", prompt])], dtype=np.int64)
(text,) = sessions["text_encoder"].run(["last_hidden_state"], {"input_ids": ids})

# Noise to latents: DDIM (arXiv 2010.02502, eq. 12 with eta = 0) with classifier-free guidance.
schedule = json.loads((bundle / "scheduler" / "scheduler_config.json").read_text())
beta = np.linspace(schedule["beta_start"] ** 0.5, schedule["beta_end"] ** 0.5, schedule["num_train_timesteps"]) ** 2
alpha_bar = np.cumprod(1 - beta)
side = constants["native_size"] // constants["vae_scale"]
x = np.random.default_rng(0).standard_normal((1, constants["latent_channels"], side, side)).astype(np.float32)
timesteps = np.arange(0, 1000, 40)[::-1] + 1
for t, t_next in zip(timesteps, [*timesteps[1:], 0], strict=True):
    feeds = {"sample": np.repeat(x, 2, axis=0), "timestep": np.float32(t), "encoder_hidden_states": text}
    (out_sample,) = sessions["unet"].run(["out_sample"], {k: np.asarray(v, np.float32) for k, v in feeds.items()})
    guided = out_sample[:1] + guidance * (out_sample[1:] - out_sample[:1])
    alpha, sigma = np.sqrt(alpha_bar[t]), np.sqrt(1 - alpha_bar[t])
    eps = alpha * guided + sigma * x if schedule["prediction_type"] == "v_prediction" else guided
    x0 = (x - sigma * eps) / alpha
    x = np.float32(np.sqrt(alpha_bar[t_next]) * x0 + np.sqrt(1 - alpha_bar[t_next]) * eps)

# Latents to pixels.
latents = x / constants["scaling_factor"] + constants["shift_factor"]
(pixels,) = sessions["vae_decoder"].run(["sample"], {"latent_sample": np.float32(latents)})
image = Image.fromarray((np.clip(pixels[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8))
image.resize((256, 256)).save(out)
print(out)
