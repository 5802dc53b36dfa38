"""Tensors that ONNX Runtime reads and writes where they lie: one I/O binding for each thread and shape, used again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

_KEPT = 8  # shapes of one thread
# Without it a run waits for the device at its end. Only for what goes on on the session's own stream.
_NO_WAIT = "disable_synchronize_execution_providers"


class Bindings:
    """The I/O bindings of one session.

    An address is bound again only where it has changed: torch's allocator gives the same memory again and again.

    Args:
        session: ONNX Runtime's.
        device: where the tensors lie: "cpu", "cuda:0", ...
        queued: whether runs are queued on a stream of torch's, so that nobody waits for them.
    """

    def __init__(self, session: Any, device: str, *, queued: bool = False):
        self.session, self._local = session, threading.local()
        kind, _, number = device.partition(":")
        self._where = kind, int(number or 0)
        self._options = None
        if queued:
            import onnxruntime as ort

            self._options = ort.RunOptions()
            self._options.add_run_config_entry(_NO_WAIT, "1")

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Run on torch tensors; those of the outputs are written.

        Args:
            inputs: contiguous tensors by name.
            outputs: tensors of the shapes that the graph makes of them.
        """
        binding, bound = self._of({name: tuple(value.shape) for name, value in inputs.items()})
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, value in tensors.items():
                if bound.get(name) != value.data_ptr():
                    dtype = np.dtype(str(value.dtype).removeprefix("torch."))
                    bind(name, *self._where, dtype, tuple(value.shape), value.data_ptr())
                    bound[name] = value.data_ptr()
        self.session.run_with_iobinding(binding, self._options)

    def _of(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, dict[str, int]]:
        """The calling thread's binding of these shapes, and the addresses that are bound in it."""
        if not hasattr(self._local, "kept"):
            self._local.kept = OrderedDict()
        kept, key = self._local.kept, tuple(sorted(shapes.items()))
        kept[key] = kept.pop(key, None) or (self.session.io_binding(), {})
        while len(kept) > _KEPT:
            kept.popitem(last=False)
        return kept[key]
