"""Refit LoRA weights into a built engine, in seconds instead of the minutes of a build.

Every refit starts from the bundle's own weights and also resets what the last one changed, so A, B, A is bit-identical:
`digest` identifies the weights that the engine runs with, and is the same both times. (Adding and subtracting in place
would leave rounding errors, NVIDIA/TensorRT#3628.) `accel.load(BUNDLE, "tensorrt", loras=[...])` does it too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import digest_of
from ..models.lora.files import Spec
from ..models.lora.for_bundle import fused
from ..models.weight_files import stored
from ..trt import library
from ..trt.workspace import workspace


class Refit:
    """Refits a refittable engine. No other thread may run the engine meanwhile.

    Args:
        engine: a loaded TensorRT engine that was built with `--refittable`.

    Attributes:
        digest: sha256 over the bundle, and names and contents of the weights that are not its own.
        changed: names of the weights that are not the bundle's own.

    Raises:
        UserError: for an engine that is not refittable, or a TensorRT version that refits wrongly.
    """

    def __init__(self, engine: Any):
        engine.library.refuse_broken_refit()
        name = engine.component.name
        if form := engine.component.format:
            raise UserError(
                f"the TensorRT engine of {name} is {form}, and cannot be refitted: its scales belong to its weights",
                "another engine takes them at run time; or put them in at export: accel export MODEL OUT --lora FILE "
                "(--embedding FILE for textual inversion)",
            )
        if not engine.engine_file.identity["options"]["refittable"]:
            raise UserError(f"the engine of {name} is not refittable", f"{engine.rebuild()} --refittable")
        self.engine = engine
        self._own = stored(engine.bundle.file(engine.bundle.component(name).weights))

    def loras(self, files: Sequence[Spec]) -> str:
        """Refit the bundle's weights with these LoRA files fused into them; without files, the bundle's own weights.

        Returns:
            The new digest.

        Raises:
            UserError: when a file does not fit (nothing is changed then), or TensorRT refuses the weights.
        """
        name = self.engine.component.name
        return self.weights(fused(self.engine.bundle, files).tensors.get(name, {}))

    def weights(self, tensors: Mapping[str, np.ndarray]) -> str:
        """Refit these tensors in place of the bundle's own of the same names, and all others back to the bundle's own.

        Returns:
            The new digest.

        Raises:
            UserError: when TensorRT refuses them; the engine then has the weights that it had.
        """
        hashes = {key: _hash(value) for key, value in tensors.items()}
        hashes = {key: value for key, value in hashes.items() if value != _hash(self._own[key])}
        changed = frozenset(hashes)
        self._send({**self._own, **tensors}, changed | self.changed)
        self.engine.refitted = hashes
        return self.digest

    @property
    def changed(self) -> frozenset[str]:
        return frozenset(self.engine.refitted)

    @property
    def digest(self) -> str:
        return digest_of([self.engine.bundle.digest, self.engine.component.name, self.engine.refitted])

    def _send(self, state: Mapping[str, np.ndarray], names: frozenset[str]) -> None:
        """Set weights by name, and those that TensorRT needs along with them."""
        engine, module = self.engine, self.engine.module
        if not names:
            return
        work = workspace(engine.cuda)
        with library.collect() as messages, engine.cuda.on(work.stream):
            refitter = module.Refitter(engine.engine, library.logger(module))
            held: list[Any] = []  # TensorRT keeps pointers until the refit is done
            for name in sorted(names):
                self._set(refitter, name, state, held, messages)
            for name in refitter.get_missing_weights():
                self._set(refitter, name, state, held, messages)
            if not refitter.refit_cuda_engine_async(work.handle):
                raise self._failure(messages.last())
            engine.cuda.synchronize(work.stream)
        engine.epoch += 1  # captured graphs still use the old weights

    def _set(
        self, refitter: Any, name: str, state: Mapping[str, np.ndarray], held: list[Any], messages: library.Messages
    ) -> None:
        if name not in state:
            raise self._failure(f"it needs {name}, which is not a weight of the network")
        array = np.require(state[name], requirements="CA")
        weights = self.engine.module.Weights(array)
        held.append((array, weights))
        if not refitter.set_named_weights(name, weights):
            raise self._failure(messages.last())

    def _failure(self, reason: str) -> UserError:
        return UserError(
            f"TensorRT cannot refit {self.engine.component.name}: {reason}",
            "put the weights in at export instead: accel export MODEL OUT --lora FILE, --embedding FILE",
        )


def _hash(value: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).view(np.uint8)).hexdigest()
