"""The names of LoRA files: which network, which layer, and which part of its update a tensor is.

diffusers' and peft's files name layers with dots; kohya's, LyCORIS' and OneTrainer's write them with underscores, and
number the blocks of SDXL's UNet as the original code does. With all dots written as underscores, both are looked up in
one table of the layers that the network has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Beginnings of names, longest first.
_PREFIXES = {
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "lora_unet_": "unet",
    "lora_unet.": "unet",
    "lycoris_unet_": "unet",
    "unet.": "unet",
    **{
        f"{start}{dot}": component
        for start, component in (
            ("lora_te2", "text_encoder_2"),
            ("lora_te1", "text_encoder"),
            ("lora_te", "text_encoder"),
            ("text_encoder_2", "text_encoder_2"),
            ("text_encoder", "text_encoder"),
        )
        for dot in "._"
        if not (start.startswith("text") and dot == "_")
    },
    "lycoris_": "unet",
}
# Spellings of a part -> its name here.
_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_B.bias": "bias",
    "lora_up.bias": "bias",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "scalar": "scalar",
    "diff": "diff",
    "diff_b": "diff_bias",
    "w_norm": "diff",
    "b_norm": "diff_bias",
    **{name: name for name in "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2".split()},
    **{name: name for name in "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2".split()},
}
_KEY = re.compile(rf"(.+?)[._]({'|'.join(re.escape(part) for part in sorted(_PARTS, key=len, reverse=True))})")
# Layers that diffusers' attention processors and text encoders once named otherwise.
_OLD = (
    (re.compile(r"_processor_"), "_"),
    (re.compile(r"(attn\d?)_to_out$"), r"\1_to_out_0"),
    (re.compile(r"self_attn_to_([qkv])$"), r"self_attn_\1_proj"),
    (re.compile(r"self_attn_to_out$"), "self_attn_out_proj"),
)
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@dataclass(frozen=True)
class Key:
    """What the name of a tensor says: the component, the layer as it is written, and the part of the update."""

    component: str
    layer: str
    part: str


def parsed(key: str) -> Key | None:
    """The name of a tensor of a LoRA file, taken apart; None for one that no such file has.

    A name without the component's is of the UNet, as files were before there were prefixes.
    """
    match = _KEY.fullmatch(key.replace(".default.", "."))
    if match is None:
        return None
    name, part = match[1], _PARTS[match[2]]
    start = next((start for start in _PREFIXES if name.startswith(start)), "")
    return Key(_PREFIXES.get(start, "unet"), name.removeprefix(start), part)


def places(modules: Iterable[str]) -> dict[str, str]:
    """Every spelling of a network's layers, with underscores for dots -> the layer's own name."""
    modules = list(modules)
    table = {}
    for spelling, module in (*_original(modules), *((module, module) for module in modules)):
        table[spelling.replace(".", "_")] = module
    return table


def place(layer: str, table: dict[str, str]) -> str | None:
    """The layer of a network that is meant by the name in a file; None where there is none."""
    flat = layer.replace(".", "_")
    for pattern, better in _OLD:
        flat = pattern.sub(better, flat)
    # transformers once kept CLIP's text model a level deeper.
    names = (flat, flat.removeprefix("text_model_"), f"text_model_{flat}")
    return next((table[name] for name in names if name in table), None)


def _original(modules: list[str]) -> Iterable[tuple[str, str]]:
    """(name in the original code, name here) of a UNet's layers: it numbers the blocks of each half through."""
    roots = {old: new for old, new in _OUTER.items()}
    known = set(modules)

    def has(name: str) -> bool:
        return any(module == name or module.startswith(f"{name}.") for module in known)

    def resnet(old: str, new: str) -> None:
        roots.update({f"{old}.{inner}": f"{new}.{ours}" for inner, ours in _RESNET.items()})

    count, block = 1, 0
    while has(f"down_blocks.{block}"):
        layer = 0
        while has(new := f"down_blocks.{block}.resnets.{layer}"):
            resnet(f"input_blocks.{count}.0", new)
            roots[f"input_blocks.{count}.1"] = new.replace("resnets", "attentions")
            count, layer = count + 1, layer + 1
        if has(down := f"down_blocks.{block}.downsamplers.0.conv"):
            roots[f"input_blocks.{count}.0.op"] = down
            count += 1
        block += 1
    resnet("middle_block.0", "mid_block.resnets.0")
    roots["middle_block.1"] = "mid_block.attentions.0"
    resnet("middle_block.2", "mid_block.resnets.1")
    count = block = 0
    while has(f"up_blocks.{block}"):
        layer = 0
        while has(new := f"up_blocks.{block}.resnets.{layer}"):
            resnet(f"output_blocks.{count}.0", new)
            attention = new.replace("resnets", "attentions")
            roots[f"output_blocks.{count}.1"] = attention
            if not has(f"up_blocks.{block}.resnets.{layer + 1}") and has(f"up_blocks.{block}.upsamplers.0"):
                at = 2 if has(attention) else 1
                roots[f"output_blocks.{count}.{at}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
            count, layer = count + 1, layer + 1
        block += 1
    spelt = {new: old for old, new in roots.items()}
    for module in modules:
        parts = module.split(".")
        for end in range(len(parts), 0, -1):
            if old := spelt.get(".".join(parts[:end])):
                yield ".".join([old, *parts[end:]]), module
                break
