"""The int8 config: which layers of a network compute in int8, and how their ranges are found.

A level names the kinds of layers, the least sensitive first; each level adds one kind to the level before it:
convolutions; feed-forward; queries, keys and values; all other layers with weights; the scores q k^T of self-attention;
its softmax weights times the values. Some layers stay in higher precision at every level, by name: the time and size
embeddings, whose rounding error reaches every block (TFMQ-DM, arXiv 2311.16503), and the first and last convolutions
and the shortcuts, which are the most sensitive layers and cost little time (MixDQ, arXiv 2405.17873).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from .. import records
from ..errors import UserError
from .formats import BLOCKS, FORMATS, Format

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
OBSERVERS = ("max", "percentile", "mse")

# A layer stays in higher precision when any part of its dotted name is one of these.
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

# Tokens of CLIP's context. A longer context is several of these end to end (`accel.text.prompts`), each with its
# own begin-of-text token.
TEXT = 77

_FEED_FORWARD = re.compile(r"(^|\.)(ff\.net|mlp)\.")
_QKV = re.compile(r"(^|\.)(to_q|to_k|to_v|q_proj|k_proj|v_proj)$")
_CROSS_KEYS_VALUES = re.compile(r"(^|\.)attn2\.(to_k|to_v)$")


@dataclass(frozen=True)
class Int8Config:
    """How a network is quantized: weights per output channel, activations per tensor, both symmetric.

    Attributes:
        format: a key of `accel.int8.formats.FORMATS`.
        block: inputs that share a scale, of formats that have blocks.
        level: a key of `LEVELS`.
        keep: layers that stay in higher precision besides `KEPT`: names, prefixes of dotted names, or patterns
            with `*`.
        observer: how calibration chooses a range from the histogram of magnitudes: max, percentile, or mse (least
            squared error).
        percentile: share of the magnitudes that the percentile observer covers, in per cent.
        smooth: SmoothQuant's alpha (Xiao et al. 2022, arXiv 2211.10438) for linear layers; 0 for none.
        exclude_bos: compute the begin-of-text tokens of cross-attention keys and values in float (MixDQ).
        outputs: quantize the outputs of convolutions too, which ONNX Runtime's integer convolutions need.
    """

    level: str = "all"
    keep: tuple[str, ...] = ()
    observer: str = "mse"
    percentile: float = 99.99
    smooth: float = 0.0
    exclude_bos: bool = True
    outputs: bool = True
    format: str = "int8"
    block: int = 64

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(f"unknown number format {self.format!r}", f"one of: {', '.join(FORMATS)}")
        if self.block not in BLOCKS:
            raise UserError(f"invalid block: {self.block}", f"one of: {', '.join(map(str, BLOCKS))}")
        if self.level not in LEVELS:
            raise UserError(f"unknown int8 level {self.level!r}", f"one of: {', '.join(LEVELS)}")
        if self.observer not in OBSERVERS:
            raise UserError(f"unknown int8 observer {self.observer!r}", f"one of: {', '.join(OBSERVERS)}")
        if not 50 < self.percentile <= 100:
            raise UserError(f"invalid percentile: {self.percentile} (expected above 50, at most 100)", "such as 99.99")
        if not 0 <= self.smooth <= 1:
            raise UserError(f"invalid SmoothQuant alpha: {self.smooth} (expected 0 to 1)", "0 for none, or such as 0.5")
        if not self.number_format.activations:
            if self.smooth:
                raise UserError(
                    f"SmoothQuant is for activations, which {self.format} leaves as they are", "leave --smooth out"
                )
            if set(LEVELS[self.level]) & set(PRODUCTS):
                raise UserError(
                    f"level {self.level} has products without weights, and {self.format} is for weights",
                    "--int8-level all",
                )

    @property
    def number_format(self) -> Format:
        return FORMATS[self.format]

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self) | {"keep": list(self.keep)}
        if self.format == "int8":  # as it was written before there were others: the digest of engine files is of it
            del found["format"]
        if not self.number_format.blocked:
            del found["block"]
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Int8Config:
        """Read what `as_dict` wrote, in 0.1 too, where two fields had other names."""
        old = {"collector": "observer", "bos_apart": "exclude_bos"}
        data = {old.get(name, name): value for name, value in data.items()}
        if unknown := set(data) - {field.name for field in fields(cls)}:
            raise ValueError(f"int8 config: unknown key {unknown.pop()!r}")
        return records.read(cls, data, "int8 config")


def kind(name: str, convolution: bool) -> str:
    """The member of `KINDS` that a layer of this name belongs to."""
    if convolution:
        return "conv"
    if is_product(name):
        return name.rpartition(".")[2]
    if _FEED_FORWARD.search(name):
        return "ff"
    return "qkv" if _QKV.search(name) else "linear"


def is_product(name: str) -> bool:
    """Whether a dotted name belongs to a product of self-attention, not to a layer with weights."""
    return name.rpartition(".")[2] in PRODUCTS


def bos_layer(name: str) -> bool:
    """Whether a layer computes cross-attention keys or values, whose input has begin-of-text tokens."""
    return bool(_CROSS_KEYS_VALUES.search(name))


def fitting(config: Int8Config, layers: Mapping[str, bool]) -> list[str]:
    """Names of the layers that a config quantizes.

    Args:
        layers: {name: whether it is a convolution (otherwise linear, or a product)} of all layers that can be int8.
    """
    kinds = LEVELS[config.level]
    return [
        name
        for name, convolution in layers.items()
        if kind(name, convolution) in kinds
        and not set(name.split(".")) & set(KEPT)
        and not any(matches(name, pattern) for pattern in config.keep)
    ]


def chosen(config: Int8Config, layers: Mapping[str, bool]) -> list[str]:
    """As `fitting`, for a network that must have such layers.

    Raises:
        UserError: when a name in `keep` matches no layer, or nothing is left to quantize.
    """
    for pattern in config.keep:
        if not any(matches(name, pattern) for name in layers):
            raise UserError(f"no layer is called {pattern!r}", f"some of: {', '.join(sample(layers))}")
    names = fitting(config, layers)
    if not names:
        found = sorted({kind(name, convolution) for name, convolution in layers.items()}, key=KINDS.index)
        raise UserError(
            f"the int8 config quantizes no layer (level {config.level}; this network has layers of kind "
            f"{', '.join(found) or 'none'}: {', '.join(sample(layers))})",
            f"choose one of the levels {', '.join(LEVELS)}, and keep fewer layers",
        )
    return names


def matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or ("*" in pattern and fnmatchcase(name, pattern))


def sample(names: Iterable[str], count: int = 12) -> list[str]:
    names = list(names)
    return names[:count] + [f"... ({len(names)} in all)"] * (len(names) > count)
