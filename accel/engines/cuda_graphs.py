"""TensorRT work as CUDA graphs: captured once for each shape, and anew when what it was captured on has changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

from ..trt.workspace import workspace

_KEPT = 4  # graphs per engine and thread: each holds its context and its buffers


class Capturable(Protocol):
    """What a capture needs of an engine (`accel.engines.tensorrt.TensorRT`).

    Attributes:
        epoch: changes with every change of the weights.
    """

    component: Any
    cuda: Any
    epoch: int

    def nearest(self, shapes: Mapping[str, tuple[int, ...]]) -> int: ...

    def context(self) -> Any: ...

    def prepare(
        self, context: Any, profile: int, inputs: Mapping[str, Any], outputs: Mapping[str, Any], workspace: Any
    ) -> int: ...

    def execute(self, context: Any, workspace: Any) -> None: ...


class Bound:
    """An execution context tied to fixed buffers for one shape: what a CUDA graph can be captured from.

    TensorRT leaves undefined what a graph does after its context was changed, so each captured shape has one of these.

    Attributes:
        inputs, outputs: the buffers. Fill, `enqueue`, read.
    """

    def __init__(self, engine: Capturable, sizes: Mapping[str, int]):
        component, cuda = engine.component, engine.cuda
        self.workspace, self.engine, self.epoch = workspace(cuda), engine, engine.epoch
        self.inputs = {s.name: cuda.empty(s.concrete(sizes), s.dtype) for s in component.inputs}
        self.outputs = {s.name: cuda.empty(s.concrete(sizes), s.dtype) for s in component.outputs}
        with cuda.on(self.workspace.stream):
            profile = engine.nearest({name: tuple(t.shape) for name, t in self.inputs.items()})
            self.context = engine.context()
            self.scratch = engine.prepare(self.context, profile, self.inputs, self.outputs, self.workspace)

    @property
    def stale(self) -> bool:
        """Whether scratch memory has moved or weights have changed since."""
        memory = self.workspace.memory
        return self.epoch != self.engine.epoch or memory is None or memory.data_ptr() != self.scratch

    def enqueue(self) -> None:
        self.engine.execute(self.context, self.workspace)


class Graph:
    """Work on a `Bound` that is captured the first time it runs, and replayed from then on.

    Args:
        work: queues it; may not wait for the GPU.
    """

    def __init__(self, bound: Bound, work: Callable[[], None]):
        self.bound, self.work, self.replay = bound, work, None

    def run(self) -> None:
        """On the workspace's stream, which has to be the current one."""
        if self.replay is None:
            self.work()  # TensorRT and torch want one ordinary run before a capture
            self.replay = self.bound.engine.cuda.capture(self.bound.workspace.stream, self.work)
        self.replay()


class Captures:
    """One thread's graphs of one engine, the last few used of them."""

    def __init__(self):
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` made for this key, something with a `bound`; made anew where that has become stale."""
        found = self._kept.pop(key, None)
        if found is None or found.bound.stale:
            found = None  # its memory is free before the new one asks for some
            found = make()
        self._kept[key] = found
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found
