"""Estimate the memory of a few-step run (DMD2, LCM) before anything is loaded.

All phases of an iteration run on fake tensors (torch's FakeTensorMode) while the bytes of the real ones are counted.
Weights are not read, only configs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accel.int8 import fake_quant
from accel.models.source import Source

from ..data.encoders import Encoders
from ..edm.preconditioning import SIGMA_DATA, Preconditioned
from ..edm.source import ClassEncoders, EDMSource
from ..methods import qat
from ..settings import DMD2Recipe, LCMRecipe
from ..training import sharding, speed
from ..training.method import TrainedNetwork
from .dmd2 import DMD2
from .lcm import LCM
from .shared_lora import Adapted

GIB = 2**30
_MOMENTS = {"adamw": 8, "adamw8bit": 2}  # bytes for each parameter that learns
_FLOAT = 4

FewStep = DMD2 | LCM


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory at the peak of one process, in bytes, by what it holds.

    Attributes:
        parts: name -> bytes, those of `peak`.
        parameters: network -> (parameters, of which learn).
        how: the device and what it computes in; where the recipe says `auto`, what this machine would take.
    """

    parts: Mapping[str, int]
    parameters: Mapping[str, tuple[int, int]]
    how: str = ""

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        shown = [
            f"{name:<28}{whole / 1e6:10,.1f} M parameters, {learn / 1e6:,.1f} M learn"
            for name, (whole, learn) in self.parameters.items()
        ]
        shown += [f"{name:<28}{size / GIB:10.2f} GiB" for name, size in self.parts.items()]
        return [f"as on {self.how}", *shown, f"{'peak':<28}{self.peak / GIB:10.2f} GiB"]


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive and were made inside it.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return
        self._held.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.now -= size

    @contextlib.contextmanager
    def apart(self) -> Iterator[list[int]]:
        """The peak inside goes into the list that is given, and not into `peak`."""
        before, found = self.peak, [0]
        self.peak = self.now
        try:
            yield found
        finally:
            found[0], self.peak = self.peak, max(before, self.now)


@dataclass(frozen=True)
class FakeSource:
    """A model whose networks have shapes and no weights, to be loaded on the meta device."""

    source: Source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def load(self, component: str) -> nn.Module:
        made = self.source.network_class(component).from_config(self.source.config(component))
        if isinstance(self.source, EDMSource):
            return Preconditioned(made, self.source.config("scheduler").get("sigma_data", SIGMA_DATA))
        return made


def predict(
    recipe: DMD2Recipe | LCMRecipe, encoders: Encoders | ClassEncoders, *, shards: int = 1, foreach: bool = True
) -> MemoryEstimate:
    """The peak of one process.

    Mixed precision is the CPU autocast's; a GPU's keeps a few more layers in float32. What FSDP2 gathers for the layer
    that runs, and what an allocator loses to fragments, is not counted.

    Args:
        recipe: the settings.
        encoders: of the model; nothing of it is loaded.
        shards: processes of FSDP2, which divide weights, gradients, moments and averages of what learns.
        foreach: where the optimizer is not fused, it makes its steps on all tensors at once, as it does on a GPU.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ..training.loop import compute_dtype

    dmd2 = isinstance(recipe, DMD2Recipe)
    if shards > 1 and (recipe.rank or dmd2 and recipe.critic_rank):
        raise sharding.refused()
    foreach &= shards > 1 or recipe.fused == "off" or recipe.optimizer != "adamw"  # nothing is fused under FSDP2
    device = speed.device_of_process()
    recipe = speed.settled(recipe, device, sharded=shards > 1)
    dtype = compute_dtype(recipe)
    offload = dmd2 and recipe.offload_teacher
    stay = {"offload_teacher": False} if dmd2 else {}  # fake tensors do
    with torch.device("meta"):
        method: FewStep = (DMD2 if dmd2 else LCM)(recipe, fake_encoders(encoders))
        method.recipe = dataclasses.replace(recipe, compile=False, **stay)
        method.place(torch.device("meta"), dtype)
        qat.attach(method, recipe)
        for network in method.networks.values() if recipe.half_norms else ():
            speed.norms_in_half(network.core)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake(method)
        if recipe.qat:
            fake_quant.set_mode(qat.network_of(method).model, "quantize")
        if recipe.gradient_checkpointing:
            for network in method.networks.values():
                network.core.enable_gradient_checkpointing()
        used = [
            phase_bytes(method, phase, batch_of(recipe, method.encoders), foreach, shards) for phase in method.phases
        ]
        modules = modules_of(method)
        every = {id(p): p for module in modules.values() for p in weights(module)}.values()
        frozen = bytes_of(p for p in every if not p.requires_grad)
        parameters = {
            name: (sum(p.numel() for p in weights(module)), sum(p.numel() for p in learning(module)))
            for name, module in modules.items()
        }
    trained = sum(_learned(network) for network in method.networks.values())
    count = trained // _FLOAT
    averaged = sum(_learned(network) for network in method.networks.values() if network.averaged and recipe.ema)
    away = bytes_of(method.teacher.parameters()) if offload else 0
    parts = {
        "weights that learn": trained // shards,
        "frozen weights": frozen - away,
        "text encoders": text_bytes(encoders, dtype),
        "moments": count * _MOMENTS[recipe.optimizer] // shards,
        "average": averaged // shards,
        "gradients and activations": max(max(rest, inside + away) for rest, inside in used),
    }
    how = speed.described(recipe, device)
    return MemoryEstimate({name: size for name, size in parts.items() if size}, parameters, how)


def modules_of(method: FewStep) -> dict[str, nn.Module]:
    """All networks of a method by name: those that learn, and the teacher."""
    return {name: network.model for name, network in method.networks.items()} | {"teacher": method.teacher}


def _learned(network: TrainedNetwork) -> int:
    """Bytes of the weights that learn."""
    return bytes_of(learning(network.model))


def fake(method: FewStep) -> None:
    """Turn weights on the meta device, which autocast does not support, into fake tensors on the CPU."""
    made: dict[int, nn.Parameter] = {}
    modules = [part for network in modules_of(method).values() for part in inner(network)]
    for module in (part for whole in modules for part in whole.modules()):
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
                empty = torch.empty(old.shape, dtype=old.dtype)
                module._parameters[name] = made.setdefault(id(old), nn.Parameter(empty, old.requires_grad))
        for name, old in module._buffers.items():
            if old is not None and old.is_meta:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
    method.device = torch.device("cpu")
    method.family.ready()


def phase_bytes(method: FewStep, phase: Any, batch: dict[str, Any], foreach: bool, shards: int = 1) -> tuple[int, int]:
    """(peak of a phase outside of the teacher's call, peak inside of it), weights not counted.

    LCM's teacher is never away, so all is outside.
    """
    inside = [0]
    learn = [p for name in phase.networks for p in learning(method.networks[name].model)]
    parts: list[torch.Tensor] = []

    def keep_a_part(parameter: torch.Tensor) -> None:
        parts.append(parameter.grad.flatten()[: -(-parameter.numel() // shards)].clone())
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(keep_a_part) for p in learn] if shards > 1 else []
    with Live() as live:

        def apart(plain: Any) -> Any:
            def guided(*args: Any) -> torch.Tensor:
                with live.apart() as found:
                    said = plain(*args)
                inside[0] = max(inside[0], found[0])
                return said

            return guided

        if isinstance(method, DMD2):
            method.guided = apart(method.guided)
        try:
            loss, _ = method.loss(phase, batch, 0)
            loss.backward()
            del loss, _
        finally:
            for hook in hooks:
                hook.remove()
        if isinstance(method, DMD2):
            del method.guided
            method._drawn.clear()
        gradients = bytes_of(learn) // shards
        for name in phase.networks:
            method.networks[name].model.zero_grad(set_to_none=True)
    return max(live.peak, gradients * (2 if foreach else 1)), inside[0]


def batch_of(recipe: DMD2Recipe | LCMRecipe, encoders: Any) -> dict[str, Any]:
    """A batch as the loop hands it to the method, of fake tensors."""
    cells = recipe.resolution // encoders.factor
    channels = encoders.latent_channels
    batch: dict[str, Any] = {"index": list(range(recipe.batch)), "name": [""] * recipe.batch}
    for name in ("latent_mean", "latent_std"):
        batch[name] = torch.zeros(recipe.batch, channels, cells, cells)
    batch |= encoders.prompts(["0"] * recipe.batch)
    return batch | ({"time_ids": torch.zeros(recipe.batch, 6)} if encoders.sdxl else {})


def fake_encoders(encoders: Encoders | ClassEncoders) -> Any:
    """The encoders with fake sources, and prompts of the right shape instead of text encoders."""
    made = dataclasses.replace(
        encoders, source=FakeSource(encoders.source), open=lambda model: FakeSource(encoders.open(model))
    )
    if encoders.by_class:
        return made
    unet = encoders.source.config("unet")
    width = unet["cross_attention_dim"]

    def prompts(texts: Sequence[str]) -> dict[str, torch.Tensor]:
        shaped = {"context": torch.zeros(len(texts), 77, width)}
        if encoders.sdxl:
            shaped["pooled"] = torch.zeros(len(texts), encoders.source.config("text_encoder_2")["projection_dim"])
        return shaped

    made.prompts = prompts
    return made


def text_bytes(encoders: Encoders | ClassEncoders, dtype: torch.dtype) -> int:
    """Of the text encoders, which stay: the empty prompt is theirs."""
    if encoders.by_class:
        return 0
    total = 0
    for name in ("text_encoder", "text_encoder_2"):
        if encoders.source.has(name):
            cls = encoders.source.network_class(name)
            with torch.device("meta"):
                total += sum(p.numel() for p in cls(cls.config_class(**encoders.source.config(name))).parameters())
    return total * torch.empty((), dtype=dtype).element_size()


def weights(module: nn.Module) -> list[nn.Parameter]:
    """All weights that a network computes with, shared ones too."""
    return list({id(p): p for part in inner(module) for p in part.parameters()}.values())


def inner(module: nn.Module) -> list[nn.Module]:
    """A network, and the shared ones that it holds."""
    return [module, *(part.network for part in module.modules() if isinstance(part, Adapted))]


def learning(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def bytes_of(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
