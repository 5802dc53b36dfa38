"""Whether a torch module is the network that a bundle's component was exported from, by config and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..bundle import Bundle
from ..errors import UserError
from ..files import read_json
from .ip_adapter import unet as ip_adapter
from .weight_files import aliases

# What decides the shapes.
_KEYS = (
    "block_out_channels",
    "cross_attention_dim",
    "in_channels",
    "down_block_types",
    "hidden_size",
    "num_hidden_layers",
    "latent_channels",
    "layers_per_block",
    "mid_block_type",
    "adapter_type",
    "channels",
    "decoder_block_out_channels",
)


# Hooks that only look, and ways of computing the same attention.
_HARMLESS = ("transformers.utils.output_capturing", "torch.")
_PLAIN_ATTENTION = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
}
# Whose weights are compared like others.
_IP_ADAPTERS = {"IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor"}


def check_same_network(module: nn.Module, bundle: Bundle, component: str) -> None:
    """Refuse a module of another config or with other weights, so that a mistake is an error and not a wrong image.

    Every weight is compared, to the precision of the lower dtype, below the adapters that peft may have put there;
    those are not looked at. Weights that are stored in int8 are not compared; what is stored beside them is. FreeU,
    hooks and other attention, which no weight shows, are refused.

    Raises:
        UserError: naming what differs.
    """
    record = bundle.component(component)
    theirs = read_json(bundle.file(f"{record.folder}/config.json"), "the config")
    own = module.config if isinstance(module.config, dict) else module.config.to_dict()
    for key in _KEYS:
        a, b = own.get(key), theirs.get(key)
        if (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
            raise UserError(
                f"{component}: the pipeline has {key} {a}, the bundle {b}: they are different models",
                "attach a bundle that was exported from this pipeline",
            )
    _check_ip_adapter(module, theirs)
    _check_plain(module, component)
    if name := _other_weight(module, bundle, component):
        if "token_embedding" in name:
            raise UserError(
                f"{component}: the pipeline has another vocabulary than {bundle.path}, as textual inversion makes it",
                "pipeline.unload_textual_inversion() first; or pipeline.save_pretrained(FOLDER), accel export FOLDER",
            )
        merged = any(getattr(part, "merged", None) for part in module.modules())
        fix = "attach a bundle that was exported from this pipeline; accel.load(BUNDLE) draws with the bundle's weights"
        raise UserError(
            f"{component}: the pipeline and {bundle.path} have different weights, {name} for one",
            "pipeline.unfuse_lora() first: adapters are followed as they are" if merged else fix,
        )


def _check_ip_adapter(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuse a UNet whose IP-Adapters are not the one of the bundle; one without is drawn with as it is."""
    count = len(getattr(getattr(module, "encoder_hid_proj", None), "image_projection_layers", ()))
    if count and ip_adapter.KEY not in config:
        raise UserError(
            "the pipeline has an IP-Adapter, and the bundle was exported without one",
            "pipeline.unload_ip_adapter() first; or export again with --ip-adapter FILE --image-encoder FOLDER",
        )
    if count > 1:
        raise UserError(f"the pipeline has {count} IP-Adapters, and a bundle has one", "load the bundle's own alone")


def _check_plain(module: nn.Module, component: str) -> None:
    """Refuse what changes a module's outputs and is not in its weights, because the compiled network has none of it."""
    if getattr(module, "use_tiling", False):
        raise UserError(f"{component} works in tiles, which the compiled one does not", "pipeline.disable_vae_tiling()")
    for name, part in module.named_modules():
        where = f"{component}.{name}" if name else component
        if any(getattr(part, key, None) is not None for key in ("s1", "s2", "b1", "b2")):
            raise UserError(
                f"{where}: FreeU is on, which the compiled network has not", "pipeline.disable_freeu() first"
            )
        if getattr(part, "_hf_hook", None) is not None or getattr(part, "_diffusers_hook", None) is not None:
            raise UserError(f"{where} is offloaded, or has another hook", "pipeline.remove_all_hooks() first")
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if any(not str(getattr(hook, "__module__", "")).startswith(_HARMLESS) for hook in hooks):
            raise UserError(f"{where} has a hook, which would not be called", "remove the hook first (handle.remove())")
        if "forward" in part.__dict__:
            raise UserError(f"{where} has a forward of its own, which would not be called", "load the pipeline anew")
        processor = type(getattr(part, "processor", None))
        if "Attn" in processor.__name__ and processor.__name__ not in (*_PLAIN_ATTENTION, *_IP_ADAPTERS):
            raise UserError(
                f"{where} has an attention processor that the compiled network has not: {processor.__name__}",
                f"pipeline.{component}.set_default_attn_processor() first, or unload what set it ",
            )


def _other_weight(module: nn.Module, bundle: Bundle, component: str) -> str:
    """The first weight that differs, or ""."""
    record = bundle.component(component)
    packed = tuple(f"{name}." for name in record.int8.get("layers", {}))
    own = {name.replace(".base_layer.", "."): value for name, value in module.state_dict().items()}
    unused = () if getattr(module, "encoder_hid_proj", None) else ip_adapter.WEIGHTS
    with safe_open(bundle.file(record.weights), "pt") as file:
        for name in file.keys():
            if name.startswith(packed or ("\0",)) or any(part in name for part in unused):
                continue
            found = next((own[alias] for alias in aliases(name) if alias in own), None)
            if found is None or not found.is_meta and not _same(found, file.get_tensor(name)):
                return name
    return ""


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    b = b.to(a.device)
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() and b.is_floating_point()):
        return torch.equal(a, b)
    rounding = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    return torch.allclose(a.float(), b.float(), rtol=2 * rounding, atol=1e-7)
