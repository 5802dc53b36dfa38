"""What was drawn, newest first, one line each, which brings its question back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bench.report import seconds
from .compare import Pair
from .question import Question

_MOST = 100


def add(history: Sequence[Pair], pair: Pair) -> list[Pair]:
    """The history with a finished pair in front, of bounded length."""
    return [pair, *history][:_MOST]


def lines(history: Sequence[Pair]) -> list[str]:
    """One line per pair: what was asked, how long each engine took, how far apart the images are."""
    return [_line(len(history) - i, pair) for i, pair in enumerate(history)]


def _line(number: int, pair: Pair) -> str:
    question, found = pair.question, pair.difference
    answers = zip(question.engines, (pair.a, pair.b), strict=True)
    times = " · ".join(f"{engine} {seconds(drawn.seconds)}" for engine, drawn in answers if drawn)
    same = "" if found is None else " · identical" if not found.most else f" · at most {found.most} of 255 apart"
    return f"{number}. “{question.prompt}”, seed {question.seed} · {times}{same}"


def fields(question: Question) -> dict[str, Any]:
    """The values of the page's fields that ask this question again."""
    return {
        "model": question.model,
        "engine_a": question.engines[0],
        "engine_b": question.engines[1],
        "prompts": question.prompt,
        "negative": question.negative,
        "seed": str(question.seed),
        "steps": question.steps,
        "guidance": question.guidance,
        "height": question.height,
        "width": question.width,
    }
