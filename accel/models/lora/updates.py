"""What the tensors of a LoRA file do to one layer's weight W [out, in, ...].

    LoRA, LoCon    W + s a/r B A                     A: down [r, in, ...], B: up [out, r, ...]  (arXiv 2106.09685)
    with a core    W + s a/r (B x C x A)             C: mid [r, r, kh, kw]                      (LyCORIS, 2309.14859)
    LoHa           W + s a/r (B1 A1) * (B2 A2)       * element by element                       (2108.06098)
    LoKr           W + s a/r (W1 (x) W2)             Kronecker product; a/r where a factor is low-rank
    full           W + s D
    DoRA           m (W + s d) / |W + s d|           d: any of the above; |.|: norm of each output  (2402.09353)

s is the scale asked for. Without an alpha a/r is 1: kohya's rule, and diffusers'. Arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# The tensors that each kind needs; the first that is there decides.
_NEEDED = {
    "LoRA": ({"down", "up"},),
    "LoHa": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),
    "LoKr": (
        {"lokr_w1", "lokr_w2"},
        {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
        {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
        {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
    ),
    "full": ({"diff"}, {"diff_bias"}),
}
_OPTIONAL = {
    "LoRA": {"mid", "bias"},
    "LoHa": {"hada_t1", "hada_t2"},
    "LoKr": {"lokr_t2"},
    "full": {"diff", "diff_bias"},
}
_ALWAYS = {"alpha", "magnitude", "scalar"}


@dataclass(frozen=True)
class Update:
    """The change of one layer.

    Attributes:
        kind: LoRA, LoHa, LoKr or full.
        tensors: its parts by the names of `names`, float32.
        alpha: the numerator of a/r; None for r.
        root: whether r counts by its square root (rank-stabilised LoRA, arXiv 2312.03732).
    """

    kind: str
    tensors: Mapping[str, np.ndarray]
    alpha: float | None = None
    root: bool = False

    @property
    def rank(self) -> int:
        parts = self.tensors
        of = next((parts[name] for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in parts), None)
        return 0 if of is None else of.shape[0]

    @property
    def factor(self) -> float:
        """a/r, and what LyCORIS learns beside it."""
        learnt = float(self.tensors["scalar"].reshape(-1)[0]) if "scalar" in self.tensors else 1.0
        if self.alpha is None or not self.rank:
            return learnt
        return learnt * self.alpha / (self.rank**0.5 if self.root else self.rank)

    def delta(self) -> np.ndarray | None:
        """The update of the weight without the scale asked for, [out, in, ...] or [out, all the rest].

        Raises:
            ValueError: when its tensors do not fit each other.
        """
        parts, made = self.tensors, None
        if self.kind == "LoRA":
            made = _low_rank(parts["up"], parts["down"], parts.get("mid"))
        elif self.kind == "LoHa":
            one, two = (_pair(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}")) for i in (1, 2))
            made = one * two
        elif self.kind == "LoKr":
            made = _kronecker(*(_factor(parts, i) for i in (1, 2)))
        elif "diff" in parts:
            made = parts["diff"]
        return None if made is None else np.float32(self.factor) * made

    def bias(self) -> np.ndarray | None:
        """The update of the bias, [out], without the scale asked for."""
        if "bias" in self.tensors:
            return np.float32(self.factor) * self.tensors["bias"]
        return self.tensors.get("diff_bias")

    def applied(self, weight: np.ndarray, delta: np.ndarray, scale: float) -> np.ndarray:
        """The new weight, by what `delta` made. A scale of zero leaves it as it is, also with DoRA."""
        if scale == 0:
            return weight
        changed = weight + np.float32(scale) * delta.reshape(weight.shape)
        magnitude = self.tensors.get("magnitude")
        if magnitude is None:
            return changed
        # LyCORIS once took the norm of each input: [1, in], where an output's is [out, 1] or [out].
        of_inputs = magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.size == weight.shape[1] != 1
        of_inputs = of_inputs and not (magnitude.ndim == weight.ndim == 4 and magnitude.shape[1] == weight.shape[0])
        axis = 1 if of_inputs else 0
        others = tuple(i for i in range(weight.ndim) if i != axis)
        norm = np.sqrt(np.square(changed, dtype=np.float64).sum(others, keepdims=True)).astype(np.float32)
        ratio = magnitude.reshape(norm.shape) / np.maximum(norm, np.finfo(np.float32).tiny)
        return changed * ratio


def problem(parts: Mapping[str, np.ndarray]) -> str:
    """Why these parts are not one complete update; "" where they are."""
    kind = kind_of(parts)
    if kind is None:
        return "it stands without its weights"
    have = {name for name in parts if name not in _ALWAYS}
    if not any(needed <= have <= needed | _OPTIONAL[kind] for needed in _NEEDED[kind]):
        return f"it has {', '.join(sorted(parts))}"
    if any(not value.size for value in parts.values()):
        return "a tensor of it is empty"
    if any(value.size != 1 for name, value in parts.items() if name in ("alpha", "scalar")):
        return "its alpha is not a number"
    dims = {name: value.ndim for name, value in parts.items() if name not in _ALWAYS}
    able = {"bias": (1,), "diff_bias": (1,), "diff": (1, 2, 4)}
    wrong = [name for name, ndim in dims.items() if ndim not in able.get(name, (2, 4))]
    if wrong:
        return f"{wrong[0]} has the shape {list(parts[wrong[0]].shape)}"
    return ""


def kind_of(parts: Mapping[str, np.ndarray]) -> str | None:
    """Of which kind an update with these parts is."""
    for kind, starts in {"LoHa": "hada_", "LoKr": "lokr_", "LoRA": ("down", "up", "mid"), "full": "diff"}.items():
        if any(name.startswith(starts) for name in parts):
            return kind
    return None


def misfit(update: Update, delta: np.ndarray | None, shape: tuple[int, ...], bias: tuple[int, ...] | None) -> str:
    """Why an update cannot be added to a layer; "" where it can.

    Args:
        delta: what its `delta` made.
        shape: of the layer's weight.
        bias: the shape of its bias, None where it has none.
    """
    parts = update.tensors
    if not all(np.isfinite(value).all() for value in parts.values()):
        return "not finite"
    if delta is not None:
        # A 1 x 1 convolution and a linear layer are the same thing in two spellings.
        same = delta.shape[:1] == shape[:1] and delta.size == int(np.prod(shape))
        if delta.ndim == 4 or update.kind in ("LoRA", "full"):
            same = same and _sides(delta.shape) == _sides(shape)
        if not same:
            return f"{list(delta.shape)}, the model's is {list(shape)}"
        magnitude = parts.get("magnitude")
        if magnitude is not None and magnitude.size not in (shape[0], shape[1] if len(shape) > 1 else -1):
            return f"its norms are {list(magnitude.shape)}, the model's weight is {list(shape)}"
    change = update.bias()
    if change is not None and change.shape != bias:
        return "a bias that the layer has not"
    return ""


def _sides(shape: tuple[int, ...]) -> list[int]:
    return [*shape[:2], *(side for side in shape[2:] if side != 1)]


def _low_rank(up: np.ndarray, down: np.ndarray, mid: np.ndarray | None) -> np.ndarray:
    if mid is not None:
        rows, columns = (tensor.reshape(tensor.shape[0], -1) for tensor in (up, down))
        return np.einsum("om,mnkl,ni->oikl", rows, mid, columns, optimize=True)
    made = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
    return made.reshape(up.shape[0], *down.shape[1:])


def _pair(a: np.ndarray, b: np.ndarray, core: np.ndarray | None) -> np.ndarray:
    """A low-rank factor of LyCORIS: a b, or with a core for convolutions a^T x core x b."""
    return a @ b if core is None else np.einsum("ijkl,ip,jr->prkl", core, a, b, optimize=True)


def _factor(parts: Mapping[str, np.ndarray], i: int) -> np.ndarray:
    """One side of LoKr's product."""
    whole = parts.get(f"lokr_w{i}")
    return _pair(parts[f"lokr_w{i}_a"], parts[f"lokr_w{i}_b"], parts.get(f"lokr_t{i}")) if whole is None else whole


def _kronecker(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return np.kron(one.reshape(*one.shape, *[1] * (two.ndim - one.ndim)), two)
