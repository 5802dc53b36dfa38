"""Whether TensorRT takes the graphs of a bundle: asked of its real parser and builder, where they are installed.

Without them the published operator matrix answers (`operators.py`), which says less, and the answer says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from accel.bundle import Bundle, Component
from accel.bundle.graph_file import graph, graph_file
from accel.errors import UserError

from . import audit, operators, shapes
from .build import _Place, job, place, wanted
from .child import compile_apart
from .options import BuildOptions

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Answer:
    """What was found out about one component.

    Attributes:
        asked: who answered, in words.
        problems: {node, operator, reason} of what is refused.
        built: what the builder made of it, in words; "" where it was not asked.
        figures: bytes of the engine file, activations and host memory, CPU seconds, layers by precision.
    """

    asked: str
    problems: list[dict[str, str]] = field(default_factory=list)
    built: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def ask(bundle: Bundle, engine: str, *, build: bool = False, progress: Progress = lambda *_: None) -> dict[str, Answer]:
    """Ask about every component of a bundle.

    Args:
        engine: "tensorrt" or "tensorrt-rtx".
        build: build each as well, and throw the engine away: minutes for a large network.

    Raises:
        UserError: when a build is asked for and there is no builder here.
    """
    missing = ""
    try:
        where = place(engine)
    except UserError as error:
        if build:
            raise
        missing = error.message
    found = {}
    for i, (name, component) in enumerate(bundle.manifest.components.items()):

        def step(stage: str, fraction: float, i: int = i, name: str = name) -> None:
            progress(f"{name}: {stage}", (i + fraction) / len(bundle.manifest.components))

        if missing:
            rows = [vars(problem) for problem in operators.check(graph_file(bundle, component))]
            found[name] = Answer(f"the operator matrix ({operators.SOURCE}), not the parser itself: {missing}", rows)
        else:
            found[name] = _answer(bundle, component, where, build, step)
    return found


def _answer(bundle: Bundle, component: Component, where: _Place, build: bool, progress: Progress) -> Answer:
    profiles = [shapes.described(bundle, component, bundle.manifest.profile)]
    options, asked = BuildOptions(timing_cache=where.found.flavour.timing_cache), f"the parser of {where.found}"
    parsed = compile_apart(job(bundle, component, profiles, options, where, what="parse"), progress)
    if parsed.problems or not build:
        return Answer(asked, parsed.problems)
    asked = f"the parser and the builder of {where.found}"
    try:
        done = compile_apart(job(bundle, component, profiles, options, where), progress)
        counts = audit.audit(done.layers, audit.of_graph(graph(bundle, component)))
        line = audit.check(component.name, wanted(component), counts)
    except UserError as error:
        return Answer(asked, [{"node": "(graph)", "operator": "", "reason": error.message}])
    figures = {
        "bytes": len(done.data),
        "activations": done.activations,
        "host": done.peak_memory,
        "cpu_seconds": done.cpu_seconds,
        "heavy": counts["heavy"],
        "fused_attentions": counts["fused_attentions"],
        "warnings": done.warnings,
    }
    return Answer(asked, [], line, figures)
