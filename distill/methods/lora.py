"""LoRA: low-rank updates of some layers, everything else frozen (Hu et al. 2021, arXiv 2106.09685), through peft.

    W x + alpha / r * B (A x),    B = 0 at the start

The loss is that of `kd.Denoising`. The result is one small file in diffusers' format, for `load_lora_weights`.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from accel.errors import MissingPackage, UserError
from accel.models.lora import WEIGHT_NAME

from ..data.encoders import Encoders
from ..settings import LoraRecipe
from .kd import Denoising, unused_text_modules


class LowRank(Denoising):
    """A UNet, and the text encoders where the recipe says so, learn through low-rank updates alone.

    Frozen weights take the dtype of mixed precision, the updates stay in float32.
    """

    def __init__(self, recipe: LoraRecipe, encoders: Encoders):
        check(recipe)
        super().__init__(recipe, encoders)
        for name, network in self.networks.items():
            wanted = recipe.targets if name == "unet" else recipe.text_targets
            unused = [] if name == "unet" else unused_text_modules(encoders, name, network.model)
            adapt(
                network.model,
                names_of(wanted),
                recipe.rank,
                recipe.alpha,
                seed=recipe.seed,
                without=unused,
                flag="--targets" if name == "unet" else "--text-targets",
            )

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        for network in self.networks.values():
            network.model.to(device)
            for parameter in network.model.parameters():
                parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)

    def save(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors`, with alpha in its metadata."""
        networks = {name: network.model for name, network in self.networks.items()}
        save_lora(folder, networks, self.encoders, form=self.recipe.lora_format)


def check(recipe: LoraRecipe) -> None:
    """Refuse what cannot train.

    Raises:
        MissingPackage: without peft.
        UserError: for a rank or an alpha out of range.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingPackage("peft", "LoRA", extra="train")
    if recipe.rank < 1:
        raise UserError(
            f"invalid rank: {recipe.rank} (expected an integer >= 1)",
            "--rank 16; or accel distill finetune for all weights",
        )
    if not recipe.alpha > 0:
        raise UserError(f"invalid alpha: {recipe.alpha} (expected a number > 0)", f"--alpha {recipe.rank}")


def names_of(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def adapt(
    model: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    *,
    seed: int,
    without: Sequence[nn.Module] = (),
    flag: str = "--targets",
    name: str = "default",
) -> None:
    """Freeze a network and give some of its layers a trainable low-rank update, in place.

    Args:
        model: a diffusers UNet or a transformers text encoder.
        targets: linear and convolution layers, by whole names or by what these end with after a dot.
        rank, alpha: the update is alpha / rank * B A.
        seed: of A. The global random state is left as it was.
        without: parts that get none, because nothing reads what they compute.
        flag: the option that gave the targets.
        name: of the adapter.

    Raises:
        UserError: for a target that no layer has; the ones that exist are listed.
    """
    from peft import LoraConfig

    layers = {
        path.removesuffix(".base_layer")
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and ".lora_" not in path
    }
    unknown = [target for target in targets if not any(_ends(path, target) for path in layers)]
    if unknown or not targets:
        what = f"no layer of {type(model).__name__} is called {unknown[0]!r}" if unknown else "no target layers given"
        raise UserError(what, f"{flag} with some of: {', '.join(suffixes(layers))}")
    apart = {id(module) for part in without for module in part.modules()}
    excluded = [path for path, module in model.named_modules() if id(module) in apart and path in layers]
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
        torch.manual_seed(seed)
        model.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), exclude_modules=excluded or None), name
        )


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def suffixes(names: Any) -> list[str]:
    """The different last parts of module names; a number keeps what stands before it (`to_out.0`)."""
    return sorted({re.search(r"[^.]+(\.\d+)*$", name)[0] for name in names})


def save_lora(
    folder: Path, networks: dict[str, nn.Module], encoders: Encoders, adapter: str = "default", form: str = "diffusers"
) -> Path:
    """Write the updates of networks, by component name, under the names of diffusers or of kohya's programs."""
    if form == "kohya":
        return save_kohya(folder, networks, encoders, adapter)
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    layers = {}
    for name, network in networks.items():
        state = updates_of(network, adapter)
        if name != "unet":
            # transformers 5 took one level out of CLIP's names; files keep it, and diffusers reads it either way.
            inner = "" if hasattr(network, "text_model") else "text_model."
            state = convert_state_dict_to_diffusers({inner + key: value for key, value in state.items()})
        layers[f"{name}_lora_layers"] = state
        layers[f"{name}_lora_adapter_metadata"] = metadata_of(network, adapter)
    cls = StableDiffusionXLPipeline if encoders.sdxl else StableDiffusionPipeline
    cls.save_lora_weights(folder, **layers, weight_name=WEIGHT_NAME)
    return folder / WEIGHT_NAME


def save_kohya(folder: Path, networks: dict[str, nn.Module], encoders: Encoders, adapter: str = "default") -> Path:
    """Write updates by kohya's names: lora_unet_<path with _>, .lora_down.weight, .lora_up.weight, .alpha."""
    text = ("lora_te1_", "lora_te2_") if encoders.sdxl else ("lora_te_", "")
    prefixes = dict(unet="lora_unet_", text_encoder=text[0], text_encoder_2=text[1])
    written = {}
    for name, network in networks.items():
        alpha = float(network.peft_config[adapter].lora_alpha)
        inner = "" if name == "unet" or hasattr(network, "text_model") else "text_model."
        for key, value in updates_of(network, adapter).items():
            path, part = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", key).groups()
            full = prefixes[name] + (inner + path).replace(".", "_")
            written[f"{full}.lora_{'down' if part == 'A' else 'up'}.weight"] = value
            written[f"{full}.alpha"] = torch.tensor(alpha)
    save_file(written, folder / WEIGHT_NAME, metadata={"format": "pt"})
    return folder / WEIGHT_NAME


def updates_of(network: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """The trained tensors of an adapter, `<layer>.lora_A.weight` [r, in, ...] and `.lora_B.weight` [out, r, ...]."""
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, adapter_name=adapter)
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def metadata_of(network: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """What a loader must know of peft's settings, and no more: all of them would hold a path of this machine, and
    fields that another version of peft refuses."""
    config = network.peft_config[adapter]
    kept = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    excluded = sorted(config.exclude_modules or ())
    return kept | ({"exclude_modules": excluded} if excluded else {})
