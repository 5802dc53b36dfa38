"""ONNX Runtime's optimized graph of a network on a CPU, kept in the cache: the next process need not optimize it.

Optimizing takes five of the six seconds in which SD-Tiny's UNet is loaded. Filters are kept in the order in which the
processor's kernels read them, and the file is mapped: processes that load the same network have one copy of those. The
matrices of linear layers are packed by each process. ONNX Runtime could keep these as well
(`session.save_external_prepacked_constant_initializers`), but 1.31 then ends in a segmentation fault in text encoders.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..bundle import Bundle, Component, kept
from ..files import cache_dir, digest_of, inside
from ..machine import instruction_sets, machine_name, version_of

LEAST = 64 << 20  # bytes of weights; what is smaller is optimized in no time
KEPT_BYTES = 32 << 30  # of all graphs and their weights; the longest unused go first
_GRAPH, _WEIGHTS = "model.onnx", "model.bin"
_SAVING = {
    "session.optimized_model_external_initializers_file_name": _WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}


def place(bundle: Bundle, component: Component, graph: Any, settings: Mapping[str, Any]) -> Path | None:
    """Where a network is kept: elsewhere with any other weights, graph, setting, processor or ONNX Runtime.

    Args:
        graph: an `onnx.ModelProto`, its weights left in their file.
        settings: of the session and of what is done to the graph before, in values that JSON can hold.

    Returns:
        None for a network that is not kept. Of int8 graphs the kept one takes more memory, for half a second.
    """
    if component.format or bundle.file(component.weights).stat().st_size < LEAST:
        return None
    known = {
        "graph": hashlib.sha256(graph.SerializeToString()).hexdigest(),
        "settings": dict(settings),
        "onnxruntime": version_of("onnxruntime"),
        "machine": [machine_name(), *instruction_sets()],
    }
    name = f"onnxruntime/{bundle.digest[:32]}-{component.name}-{digest_of(known)[:32]}"
    return inside(cache_dir(), name, "the cache folder")


def opened(
    place: Path | None,
    size: int,
    start: Callable[[Any, Any], Any],
    fresh: Callable[[], tuple[Any, Any]],
    options: Callable[[], Any],
) -> Any:
    """A session of the kept graph; or of the network's own, whose optimized form is kept for the next time.

    Args:
        place: of the kept graph; None to keep nothing.
        size: bytes of the weights.
        start: makes a session of a graph and its `SessionOptions`.
        fresh: the network's own graph, as ONNX Runtime takes it, and its options.
        options: those of the kept graph.
    """
    if place is None:
        return start(*fresh())
    if kept.found(place):
        with contextlib.suppress(Exception):  # of ONNX Runtime: it is made anew
            return start(str(place / _GRAPH), _as_it_is(options()))
        shutil.rmtree(place, ignore_errors=True)
    made: list[Any] = []

    def write(folder: Path) -> None:
        source, saving = fresh()
        saving.optimized_model_filepath = str(folder / _GRAPH)
        for key, value in _SAVING.items():
            saving.add_session_config_entry(key, value)
        try:
            made.append(start(source, saving))
        except Exception as error:  # a full disk, or the graph itself: then it fails once more without being kept
            raise OSError(str(error)) from error

    kept.keep(place, 2 * size, KEPT_BYTES, write)
    return made[0] if made else start(*fresh())


def _as_it_is(options: Any) -> Any:
    import onnxruntime as ort

    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options
