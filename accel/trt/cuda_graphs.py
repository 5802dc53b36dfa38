"""Inference as CUDA graphs: captured once per shape, and again when weights or scratch memory have changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

from .workspace import workspace

_KEPT = 4  # graphs per engine and thread: each holds its context and its buffers


class Capturable(Protocol):
    """What a capture needs of an engine (`accel.engines.tensorrt.TensorRT`).

    Attributes:
        epoch: counts the changes of the weights.
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


class Buffers:
    """What an engine runs on while a CUDA graph holds its addresses: buffers of one shape, which stay where they are.

    Attributes:
        inputs, outputs: name -> buffer. Fill the inputs, `enqueue`, read the outputs.
    """

    def __init__(self, engine: Any, sizes: Mapping[str, int]):
        component, cuda = engine.component, engine.cuda
        self.workspace, self.engine, self.epoch = workspace(cuda), engine, engine.epoch
        self.inputs = {s.name: cuda.empty(s.concrete(sizes), s.dtype) for s in component.inputs}
        self.outputs = {s.name: cuda.empty(s.concrete(sizes), s.dtype) for s in component.outputs}

    @property
    def stale(self) -> bool:
        """Whether weights have changed since: they lie at other addresses then."""
        return self.epoch != self.engine.epoch


class Bound(Buffers):
    """An execution context bound to fixed buffers of one shape, from which a CUDA graph can be captured.

    What a graph does after its context was changed is undefined in TensorRT, so each captured shape has its own.
    """

    def __init__(self, engine: Capturable, sizes: Mapping[str, int]):
        super().__init__(engine, sizes)
        cuda = engine.cuda
        with cuda.on(self.workspace.stream):
            profile = engine.nearest({name: tuple(t.shape) for name, t in self.inputs.items()})
            self.context = engine.context()
            self.scratch = engine.prepare(self.context, profile, self.inputs, self.outputs, self.workspace)

    @property
    def stale(self) -> bool:
        """Whether scratch memory has moved or weights have changed since the context was bound."""
        memory = self.workspace.memory
        return super().stale or memory is None or memory.data_ptr() != self.scratch

    def enqueue(self) -> None:
        self.engine.execute(self.context, self.workspace)


class Graph:
    """Work on a `Bound`, captured by its first run and replayed from then on.

    Args:
        work: queues the work; must not wait for the GPU.
    """

    def __init__(self, bound: Bound, work: Callable[[], None]):
        self.bound, self.work, self.replay = bound, work, None

    def run(self) -> None:
        """Run on the workspace's stream, which has to be the current one."""
        if self.replay is None:
            self.work()  # TensorRT and torch need one ordinary run before a capture
            self.replay = self.bound.engine.cuda.capture(self.bound.workspace.stream, self.work)
        self.replay()


def replay(graph: Graph, feeds: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Copy in, run, copy out; on the graph's stream."""
    for name, value in feeds.items():
        graph.bound.inputs[name].copy_(value)
    graph.run()
    for name, value in outputs.items():
        value.copy_(graph.bound.outputs[name])


class Captures:
    """The graphs of one engine and one thread: the `_KEPT` that were used last."""

    def __init__(self):
        self._kept: OrderedDict[Hashable, Graph] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Graph]) -> Graph:
        """The graph of a key; made again where there is none or it is stale."""
        graph = self._kept.pop(key, None)
        if graph is None or graph.bound.stale:
            graph = None  # frees its memory before the new one asks for some
            graph = make()
        self._kept[key] = graph
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return graph
