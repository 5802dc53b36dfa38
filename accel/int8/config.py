"""Which layers compute in int8, as data.

A level names the kinds of layers, from the safest on: convolutions; feed-forward too; queries, keys and values too;
all layers with weights; the scores q k^T of self-attention too; its weights times the values too. Some layers stay in
higher precision by name at every level: the embeddings of time and size, whose rounding reaches every block (TFMQ-DM,
arXiv 2311.16503), and the first and last convolutions and shortcuts, which are the most sensitive of all and cost
little (MixDQ, arXiv 2405.17873).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from .. import records
from ..errors import UserError

# The two products of self-attention, which have no weights: q k^T, and softmax(scores) v (`accel.int8.attention`).
PRODUCTS = ("scores", "mix")
KINDS = ("conv", "ff", "qkv", "linear", *PRODUCTS)
LEVELS: Mapping[str, tuple[str, ...]] = {
    "conv": KINDS[:1],
    "ff": KINDS[:2],
    "qkv": KINDS[:3],
    "all": KINDS[:4],
    "scores": KINDS[:5],
    "attention": KINDS,
}
COLLECTORS = ("max", "percentile", "mse")

# A layer stays as it is when any part of its dotted name is one of these.
KEPT = (
    "time_embedding",
    "add_embedding",
    "time_emb_proj",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "post_quant_conv",
    "quant_conv",
    "text_projection",
)

# CLIP's context. Longer ones are several of this length end to end (`accel.pipeline.prompts`), each with its own
# beginning.
TEXT = 77

_FEED_FORWARD = re.compile(r"(^|\.)(ff\.net|mlp)\.")
_QKV = re.compile(r"(^|\.)(to_q|to_k|to_v|q_proj|k_proj|v_proj)$")
_CROSS_KEYS_VALUES = re.compile(r"(^|\.)attn2\.(to_k|to_v)$")


@dataclass(frozen=True)
class Int8Config:
    """How a network is quantised: weights int8 per output channel, activations int8 per tensor, both symmetric.

    Attributes:
        level: a key of `LEVELS`.
        keep: layers that stay in higher precision besides `KEPT`: names, beginnings of names, or patterns with `*`.
        collector: how a range is chosen from what calibration saw: max, percentile, or mse (least squared error).
        percentile: share of magnitudes that the percentile collector covers, in per cent.
        smooth: SmoothQuant's alpha (Xiao et al. 2022, arXiv 2211.10438) for linear layers; 0 for none.
        bos_apart: keep the begin-of-text tokens of cross-attention keys and values out of int8 (MixDQ).
        outputs: quantise what convolutions put out as well, which integer convolutions of ONNX Runtime need.
    """

    level: str = "all"
    keep: tuple[str, ...] = ()
    collector: str = "mse"
    percentile: float = 99.99
    smooth: float = 0.0
    bos_apart: bool = True
    outputs: bool = True

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UserError(f"unknown int8 level {self.level!r}", f"one of: {', '.join(LEVELS)}")
        if self.collector not in COLLECTORS:
            raise UserError(f"unknown collector {self.collector!r}", f"one of: {', '.join(COLLECTORS)}")
        if not 50 < self.percentile <= 100:
            raise UserError(f"percentile {self.percentile} makes no sense", "above 50, at most 100, such as 99.99")
        if not 0 <= self.smooth <= 1:
            raise UserError(f"SmoothQuant's alpha {self.smooth} makes no sense", "0 for none, at most 1, such as 0.5")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"keep": list(self.keep)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Int8Config:
        if unknown := set(data) - {field.name for field in fields(cls)}:
            raise ValueError(f"int8 config: unknown key {unknown.pop()!r}")
        return records.read(cls, data, "int8 config")


def kind(name: str, convolution: bool) -> str:
    """Member of `KINDS` that a layer of this name is."""
    if convolution:
        return "conv"
    if is_product(name):
        return name.rpartition(".")[2]
    if _FEED_FORWARD.search(name):
        return "ff"
    return "qkv" if _QKV.search(name) else "linear"


def is_product(name: str) -> bool:
    """Whether a dotted name is that of a product, not of a layer with weights."""
    return name.rpartition(".")[2] in PRODUCTS


def bos_layer(name: str) -> bool:
    """Whether a layer makes keys or values of texts, whose first tokens are begin-of-text tokens."""
    return bool(_CROSS_KEYS_VALUES.search(name))


def fitting(recipe: Int8Config, layers: Mapping[str, bool]) -> list[str]:
    """Names of the layers that the recipe fits.

    Args:
        layers: {name: whether it is a convolution (else linear, or a product)} of all that could be int8.
    """
    kinds = LEVELS[recipe.level]
    return [
        name
        for name, convolution in layers.items()
        if kind(name, convolution) in kinds
        and not set(name.split(".")) & set(KEPT)
        and not any(matches(name, pattern) for pattern in recipe.keep)
    ]


def chosen(recipe: Int8Config, layers: Mapping[str, bool]) -> list[str]:
    """What `fitting` gives for a network that must have some.

    Raises:
        UserError: when a name in `keep` matches no layer, or nothing is left to quantise.
    """
    for pattern in recipe.keep:
        if not any(matches(name, pattern) for name in layers):
            raise UserError(f"no layer is called {pattern!r}", f"some of: {', '.join(sample(layers))}")
    names = fitting(recipe, layers)
    if not names:
        found = sorted({kind(name, convolution) for name, convolution in layers.items()}, key=KINDS.index)
        raise UserError(
            f"the recipe quantises no layer (level {recipe.level}; this network has layers of kind "
            f"{', '.join(found) or 'none'}: {', '.join(sample(layers))})",
            f"one of the levels {', '.join(LEVELS)}, and fewer layers to keep",
        )
    return names


def matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or ("*" in pattern and fnmatchcase(name, pattern))


def sample(names: Iterable[str], count: int = 12) -> list[str]:
    names = list(names)
    return names[:count] + [f"... ({len(names)} in all)"] * (len(names) > count)
