"""Run a compiler's job in a process of its own (`accel.export.child`), and its layers through JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ..child import run_apart, serve
from . import layers
from .compiler import Compiled, Job, compile_graph

Progress = Callable[[str, float], None]
COMMAND = (sys.executable, "-m", "accel.export.tensorrt.child")
_TENSORS = ("inputs", "constants", "outputs")


def compile_apart(job: Job, progress: Progress) -> Compiled:
    """`compile_graph` in a child process; a Ctrl-C here ends it at once, and nothing of it is left.

    Raises:
        UserError: what the child raised; or that it ended without a result, with the reason as far as it is known.
    """
    result, data = run_apart(COMMAND, job.name, job.as_dict(), progress)
    result["layers"] = [_layer(row) for row in result["layers"]]
    return Compiled(**{**result, "data": data})


def main() -> None:
    """The child's side."""
    serve(_work)


def _work(job: dict[str, Any], progress: Progress) -> tuple[dict[str, Any], Any]:
    done = compile_graph(Job(**job), progress)
    result = asdict(replace(done, data=b"", layers=[]))
    del result["data"]
    return result | {"layers": [_row(layer) for layer in done.layers]}, done.data


def _row(layer: layers.Layer) -> dict[str, Any]:
    row = asdict(layer)
    for key in _TENSORS:
        row[key] = [[tensor.datatype, list(tensor.shape), tensor.name] for tensor in getattr(layer, key)]
    return row


def _layer(row: dict[str, Any]) -> layers.Layer:
    tensors = {
        key: tuple(layers.Tensor(kind, tuple(shape), name) for kind, shape, name in row[key]) for key in _TENSORS
    }
    return layers.Layer(**tensors, name=row["name"], kind=row["kind"], tactic=row["tactic"], nodes=tuple(row["nodes"]))


if __name__ == "__main__":
    main()
