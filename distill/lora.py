"""LoRA: low-rank updates of some layers, everything else frozen (Hu et al. 2021, arXiv 2106.09685), through peft.

    W x + alpha / r * B (A x),    B = 0 at the start

The loss is that of `kd.Denoising`. The result is one small file in diffusers' format, for `load_lora_weights`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accel.errors import MissingPackage, UserError
from accel.lora import WEIGHT_NAME

from .encode import Encoders
from .kd import Denoising, unused_text_modules
from .recipes import Lora


class LowRank(Denoising):
    """A UNet, and the text encoders where the recipe says so, learn through low-rank updates alone.

    Frozen weights take the dtype of mixed precision, the updates stay in float32.
    """

    def __init__(self, recipe: Lora, encoders: Encoders):
        check(recipe)
        super().__init__(recipe, encoders)
        for name, network in self.networks.items():
            wanted = recipe.targets if name == "unet" else recipe.text_targets
            unused = [] if name == "unet" else unused_text_modules(encoders, name, network.model)
            adapt(
                network.model, names_of(wanted), recipe.rank, recipe.alpha, seed=recipe.seed, without=unused,
                flag="--targets" if name == "unet" else "--text-targets",
            )  # fmt: skip

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        for network in self.networks.values():
            network.model.to(device)
            for parameter in network.model.parameters():
                parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)

    def save(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors`, with alpha in its metadata, and a card."""
        save_lora(folder, {name: network.model for name, network in self.networks.items()}, self.encoders)
        (folder / "README.md").write_text(card(self.recipe, self.encoders, tuple(self.networks)))


def check(recipe: Lora) -> None:
    """Raises: MissingPackage without peft; UserError for a rank or alpha that cannot be."""
    if importlib.util.find_spec("peft") is None:
        raise MissingPackage("peft", "LoRA", extra="train")
    if recipe.rank < 1:
        raise UserError(f"a rank of {recipe.rank} is none", "--rank 16; or accel distill finetune for all weights")
    if not recipe.alpha > 0:
        raise UserError(f"alpha {recipe.alpha} gives updates without effect", f"--alpha {recipe.rank}")


def names_of(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def adapt(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, *, seed: int,
    without: Sequence[nn.Module] = (), flag: str = "--targets",
) -> None:
    """Freeze a network and give some of its layers a trainable low-rank update, in place.

    Args:
        model: a diffusers UNet or a transformers text encoder.
        targets: linear and convolution layers, by whole names or by what these end with after a dot.
        rank, alpha: the update is alpha / rank * B A.
        seed: of A. The global random state is left as it was.
        without: parts that get none, because nothing reads what they compute.
        flag: the option that gave the targets.

    Raises:
        UserError: for a target that no layer has; the ones that exist are listed.
    """
    from peft import LoraConfig

    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    unknown = [target for target in targets if not any(_ends(name, target) for name in layers)]
    if unknown or not targets:
        what = f"no layer of {type(model).__name__} is called {unknown[0]!r}" if unknown else "no target layers given"
        raise UserError(what, f"{flag} with some of: {', '.join(suffixes(layers))}")
    apart = {id(module) for part in without for module in part.modules()}
    excluded = [name for name, module in model.named_modules() if id(module) in apart and name in layers]
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), exclude_modules=excluded or None)
        )


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def suffixes(names: Any) -> list[str]:
    """The different last parts of module names; a number keeps what stands before it (`to_out.0`)."""
    return sorted({re.search(r"[^.]+(\.\d+)*$", name)[0] for name in names})


def save_lora(folder: Path, networks: dict[str, nn.Module], encoders: Encoders) -> Path:
    """Write the updates of networks, by component name, as diffusers' `save_lora_weights` does."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = {}
    for name, network in networks.items():
        state = {key: value.detach().cpu().contiguous() for key, value in get_peft_model_state_dict(network).items()}
        if name != "unet":
            # transformers 5 took one level out of CLIP's names; files keep it, and diffusers reads it either way.
            inner = "" if hasattr(network, "text_model") else "text_model."
            state = convert_state_dict_to_diffusers({inner + key: value for key, value in state.items()})
        layers[f"{name}_lora_layers"] = state
        layers[f"{name}_lora_adapter_metadata"] = metadata_of(network)
    cls = StableDiffusionXLPipeline if encoders.sdxl else StableDiffusionPipeline
    cls.save_lora_weights(folder, **layers, weight_name=WEIGHT_NAME)
    return folder / WEIGHT_NAME


def metadata_of(network: nn.Module) -> dict[str, Any]:
    """What a loader must know of peft's settings, and no more: all of them would hold a path of this machine, and
    fields that another version of peft refuses."""
    config = network.peft_config["default"]
    kept = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    excluded = sorted(config.exclude_modules or ())
    return kept | ({"exclude_modules": excluded} if excluded else {})


def card(recipe: Lora, encoders: Encoders, components: Sequence[str]) -> str:
    """README.md of a LoRA folder."""
    prompt = getattr(recipe, "instance_prompt", "") or recipe.sample_prompts.split("|")[0].strip() or "..."
    pipeline = "StableDiffusionXLPipeline" if encoders.sdxl else "StableDiffusionPipeline"
    model = encoders.source.name
    base = f"base_model: {model}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else ""
    note = "" if recipe.alpha == recipe.rank else (
        "\nAlpha differs from the rank and stands in the file's metadata (`lora_adapter_metadata`), which diffusers\n"
        "reads. A program that does not would apply it at another strength: scale it there by alpha / rank.\n"
    )  # fmt: skip
    return f"""---
library_name: diffusers
{base}tags: [lora, text-to-image, stable-diffusion{'-xl' if encoders.sdxl else ''}]
---

# LoRA of {model}

Rank {recipe.rank}, alpha {recipe.alpha:g}, of {', '.join(components)}; {recipe.steps} steps at a learning rate of
{recipe.learning_rate:g}. `training.json` has all settings.

```python
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained({model!r})
pipe.load_lora_weights(".")  # this folder
pipe({prompt!r})
```

Fused into a bundle: `accel export {model} BUNDLE --lora .` (`--lora .=0.8` for a weaker one).
{note}"""
