"""One frozen network under several low-rank adapters: generator, fake score and teacher in the memory of one.

    generator   W x + alpha / r * B_g (A_g x)        fake score   W x + alpha / r * B_f (A_f x)        teacher   W x

(LoRA, Hu et al. 2021, arXiv 2106.09685; through peft.)
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from accel.errors import MissingPackage, UserError

from ..methods.lora import adapt, names_of
from ..settings import DMD2Recipe, FewStepRecipe

GENERATOR = "generator"


class Shared:
    """A network and which of its adapters is switched on.

    peft's own switch also changes what requires a gradient; a backward pass would then lose those of the adapter that
    is off by the time it runs. Here all adapters stay trainable, and only the forward pass changes.
    """

    def __init__(self, network: nn.Module):
        self.network = network.requires_grad_(False)
        self.on: str | None = None

    def add(self, name: str, targets: Sequence[str], rank: int, alpha: float, *, seed: int) -> Adapted:
        """A new adapter, off at first.

        Raises:
            UserError: for targets that the network does not have.
        """
        others = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        adapt(self.network, targets, rank, alpha, seed=seed, name=name)
        for parameter in others:
            parameter.requires_grad_(True)
        made = Adapted(self, name)
        self.switch(self.on)
        return made

    def plain(self) -> Adapted:
        """The network without adapters."""
        return Adapted(self, None)

    def switch(self, name: str | None) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.on = name
        for layer in self.network.modules():
            if isinstance(layer, BaseTunerLayer):
                layer._disable_adapters = name is None
                layer._active_adapter = [name] if name else []

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        before = self.on
        self.switch(name)
        try:
            yield self.network
        finally:
            self.switch(before)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute in the backward pass, each part under the adapter that it ran with."""

        def again(function: Callable[..., Any], *args: Any) -> Any:
            name = self.on

            def run(*given: Any) -> Any:
                with self.using(name):
                    return function(*given)

            return checkpoint(run, *args, use_reentrant=False)

        self.network.enable_gradient_checkpointing(again)


class Adapted(nn.Module):
    """A shared network under one adapter. Its parameters are the adapter's alone; without one it has none.

    Args:
        shared: the network.
        name: of the adapter, or None for the network as it is.
    """

    def __init__(self, shared: Shared, name: str | None):
        super().__init__()
        self._shared, self._name = shared, name
        if name:
            for path, parameter in shared.network.named_parameters():
                if f".{name}." in path:
                    self.register_parameter(path.replace(".", "/"), parameter)

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.within(lambda network: network(*args, **options))

    def within(self, function: Callable[[nn.Module], Any]) -> Any:
        """function(network) while the adapter is on."""
        with self._shared.using(self._name) as network:
            return function(network)

    def enable_gradient_checkpointing(self) -> None:
        self._shared.enable_gradient_checkpointing()

    def set_attn_processor(self, processor: Any) -> None:
        self.network.set_attn_processor(processor)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self._shared.network.parameters() if not p.requires_grad)

    @property
    def network(self) -> nn.Module:
        return self._shared.network


def is_shared(module: nn.Module) -> bool:
    """Whether a module computes with a network that others compute with too."""
    return any(isinstance(part, Adapted) for part in module.modules())


def student(recipe: FewStepRecipe, family: Any) -> tuple[nn.Module, Shared | None]:
    """The network that becomes the student, and the one that it shares if it is a LoRA.

    Raises:
        UserError: for ranks below 0.
        MissingPackage: for a rank without peft.
    """
    source = family.encoders.source
    if not recipe.rank:
        return whole(family, source), None
    check(recipe)
    base = Shared(family.load(source))
    return add(base, GENERATOR, recipe.rank, recipe), base


def teacher(family: Any, base: Shared | None) -> nn.Module:
    """The frozen teacher: what the student shares with others where that is the same network, else one of its own."""
    if base and family.teacher is family.encoders.source:
        return base.plain()
    return family.load(family.teacher).requires_grad_(False).eval()


def networks(recipe: DMD2Recipe, family: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Generator, fake score and teacher of a DMD2 run, sharing what is frozen.

    Raises:
        UserError: for ranks below 0, or a teacher that is to be offloaded but is shared.
        MissingPackage: for ranks without peft.
    """
    source, same = family.encoders.source, family.teacher is family.encoders.source
    if recipe.rank or recipe.critic_rank:
        check(recipe)
        if not family.guides:
            raise UserError(f"{source.name} takes no LoRA", "leave out --rank and --critic-rank")
        if recipe.offload_teacher and (recipe.critic_rank or same):
            raise UserError("the teacher shares its weights with a network that learns", "leave out --offload-teacher")
    generator, base = student(recipe, family)
    if not recipe.critic_rank:
        return generator, whole(family, family.teacher), teacher(family, base)
    real = base if base and same else Shared(family.load(family.teacher))
    return generator, add(real, "critic", recipe.critic_rank, recipe), real.plain()


def whole(family: Any, source: Any) -> nn.Module:
    return family.load(source).requires_grad_(True).train()


def add(shared: Shared, name: str, rank: int, recipe: FewStepRecipe) -> nn.Module:
    shared.network.train()
    return shared.add(name, names_of(recipe.targets), rank, recipe.alpha or rank, seed=recipe.seed)


def check(recipe: FewStepRecipe) -> None:
    if importlib.util.find_spec("peft") is None:
        raise MissingPackage("peft", "LoRA", extra="train")
    ranks = {name: value for name, value in vars(recipe).items() if name in ("rank", "critic_rank", "alpha")}
    if min(ranks.values()) < 0:
        given = ", ".join(f"{name} {value}" for name, value in ranks.items())
        raise UserError(f"invalid {given} (expected >= 0)", "--rank 64 --alpha 8; 0 for none")


def place(network: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Move a network; what is frozen takes the dtype, what learns stays in float32."""
    model = network.network if isinstance(network, Adapted) else network
    if any(parameter.device != torch.device(device) for parameter in model.parameters()):
        model.to(device)
    for parameter in model.parameters():
        wanted = torch.float32 if parameter.requires_grad else dtype
        if parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)


def dtype_of(network: nn.Module) -> torch.dtype:
    """Of the weights that do not learn."""
    return network.dtype if isinstance(network, Adapted) else next(network.parameters()).dtype


def within(network: nn.Module, function: Callable[[nn.Module], Any]) -> Any:
    """function(network), with its adapter on if it has one."""
    return network.within(function) if isinstance(network, Adapted) else function(network)
