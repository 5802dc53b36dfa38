"""A bundle's text encoders as a CLIP of ComfyUI."""

from __future__ import annotations

from typing import Any

import torch

from accel import UserError
from accel.pipeline.conditioning import encode

from .lent import Lent


class Clip:
    """What the node CLIPTextEncode calls. Tokens are the text itself: accel's tokenizers read it."""

    def __init__(self, lent: Lent):
        self.lent = lent

    def tokenize(self, text: str, *_: Any, **__: Any) -> str:
        return text

    def encode_from_tokens(self, tokens: str, return_pooled: bool = False, return_dict: bool = False, **_: Any) -> Any:
        """Text embeddings [1, 77, D] and, of SDXL, the pooled text [1, P]; words in (brackets:1.2) are weighted."""
        pipeline = self.lent.pipeline
        encoders = {name: (pipeline.tokenizers[name], pipeline.engines[name]) for name in pipeline.tokenizers}
        found = {name: _tensor(value) for name, value in encode(encoders, [tokens], weighted=True).items()}
        states, pooled = found["encoder_hidden_states"], found.get("text_embeds")
        if return_dict:
            return {"cond": states, "pooled_output": pooled}
        return (states, pooled) if return_pooled else states

    def encode_from_tokens_scheduled(self, tokens: str, *_: Any, **__: Any) -> list[list[Any]]:
        """A CONDITIONING."""
        found = self.encode_from_tokens(tokens, return_dict=True)
        return [[found.pop("cond"), found]]

    def clone(self) -> Clip:
        return Clip(self.lent)

    def clip_layer(self, layer: int) -> None:
        raise UserError(f"CLIP layer {layer}: the layers of a compiled text encoder are fixed", "take that node out")

    def add_patches(self, patches: Any, *_: Any, **__: Any) -> list[str]:
        if patches:
            raise UserError("ComfyUI's LoRA loader cannot reach a compiled network", "use the node Accel LoRA")
        return []


def _tensor(value: Any) -> torch.Tensor:
    return value.detach().float().cpu() if isinstance(value, torch.Tensor) else torch.as_tensor(value).float()
