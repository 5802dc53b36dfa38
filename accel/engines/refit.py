"""Refit LoRA weights into a built engine, in seconds instead of the minutes of a build.

Every refit starts from the bundle's own weights and also resets what the last one changed, so A, B, A is bit-identical:
`digest` identifies the weights that the engine runs with, and is the same both times. (Adding and subtracting in place
would leave rounding errors, NVIDIA/TensorRT#3628.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import digest_of
from ..models.lora import LoraFile, fuse, lora_file
from ..trt import library
from ..trt.workspace import workspace
from .tensorrt import TensorRT


class Refit:
    """Refits a refittable engine. No other thread may run the engine meanwhile.

    Args:
        engine: a loaded TensorRT engine that was built with `--refittable`.

    Attributes:
        digest: sha256 over names and contents of all weights the engine runs with.
        changed: names of the weights that are not the bundle's own.

    Raises:
        UserError: for an engine that is not refittable, or a TensorRT version that refits wrongly.
    """

    def __init__(self, engine: TensorRT):
        engine.library.refuse_broken_refit()
        name = engine.component.name
        if not engine.engine_file.identity["options"]["refittable"]:
            raise UserError(f"the engine of {name} is not refittable", f"{engine.rebuild()} --refittable")
        self.engine = engine
        self.changed: frozenset[str] = frozenset()
        self._base = {key: _hash(tensor) for key, tensor in self._module().state_dict().items()}
        self.digest = digest_of(self._base)

    def loras(self, files: Sequence[str | Path | LoraFile], *, unet_config: Mapping[str, Any] | None = None) -> str:
        """Refit the bundle's weights with these LoRA files fused into them; without files, the bundle's own weights.

        Returns:
            The new digest.

        Raises:
            UserError: when a file does not fit (nothing is changed then), or TensorRT refuses the weights.
        """
        model, chosen = self._module(), [lora_file(file) for file in files]
        stored = {key: tensor.dtype for key, tensor in model.state_dict().items()}
        if chosen:
            fuse(model.float(), self.engine.component.name, chosen, unet_config=unet_config)
        state = {key: tensor.to(stored[key]) for key, tensor in model.state_dict().items()}
        hashes = {key: _hash(tensor) for key, tensor in state.items()}
        changed = frozenset(key for key, value in hashes.items() if value != self._base[key])
        self._send(state, changed | self.changed)
        self.changed, self.digest = changed, digest_of(hashes)
        return self.digest

    def _module(self) -> Any:
        """The network with the bundle's own weights, on the CPU."""
        from ..models import networks

        bundle, component = self.engine.bundle, self.engine.component
        return networks.rebuild(
            component.kind,
            bundle.file(f"{component.folder}/config.json"),
            bundle.file(component.weights),
            component.inputs,
            component.outputs,
        ).model

    def _send(self, state: Mapping[str, Any], names: frozenset[str]) -> None:
        """Set weights by name, and those that TensorRT needs along with them."""
        engine, module = self.engine, self.engine.module
        if not names:
            return
        work = workspace(engine.cuda)
        with library.collect() as messages, engine.cuda.on(work.stream):
            refitter = module.Refitter(engine.engine, library.logger(module))
            held = []  # TensorRT keeps pointers until the refit is done
            for name in sorted(names):
                self._set(refitter, name, state, held, messages)
            for name in refitter.get_missing_weights():
                self._set(refitter, name, state, held, messages)
            if not refitter.refit_cuda_engine_async(work.handle):
                raise self._failure(messages.last())
            engine.cuda.synchronize(work.stream)
        engine.epoch += 1  # captured graphs still use the old weights

    def _set(self, refitter: Any, name: str, state: Mapping[str, Any], held: list, messages: library.Messages) -> None:
        if name not in state:
            raise self._failure(f"it needs {name}, which is not a weight of the network")
        array = state[name].detach().contiguous().numpy()
        weights = self.engine.module.Weights(array)
        held.append((array, weights))
        if not refitter.set_named_weights(name, weights):
            raise self._failure(messages.last())

    def _failure(self, reason: str) -> UserError:
        return UserError(
            f"TensorRT cannot refit {self.engine.component.name}: {reason}",
            "fuse the LoRA before export instead: accel export MODEL OUT --lora FILE",
        )


def _hash(tensor: Any) -> str:
    import torch

    flat = tensor.detach().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"").hexdigest()
