"""FSDP2: what it can divide among processes, and how the loop reads networks whose weights are divided.

    accelerate launch --use_fsdp --fsdp_version 2 -m accel distill ...

A unit (`fully_shard`) gathers its weights for a forward pass and gives them back afterwards; the outermost one keeps
them until a backward pass. Only what it has given back are the weights that the optimizer changes, so whoever lists
parameters takes them from `parameters_of`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from accel.errors import UserError

from .method import Method, TrainedNetwork

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")  # of diffusers' UNets: one unit each, where nothing else is asked


def is_sharding(accelerator: Any) -> bool:
    from accelerate.utils import DistributedType

    return accelerator.distributed_type == DistributedType.FSDP


def asked_for() -> bool:
    """Whether the launcher asks for FSDP; whether it is in effect, `is_sharding` says."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check(method: Method, accelerator: Any) -> None:
    """Find before any work what FSDP cannot take.

    Raises:
        UserError: where FSDP was asked for and would not be in effect, for FSDP's first version, and for networks that
            it cannot divide.
    """
    if not is_sharding(accelerator):
        if asked_for():
            raise UserError(
                f"FSDP was asked for, and accelerate shards nothing here ({accelerator.num_processes} process(es), "
                f"{accelerator.device.type})",
                "start it with accelerate launch or torchrun on GPUs, or leave out --use_fsdp",
            )
        return
    if accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise UserError("this is FSDP's first version, training takes the second", "add --fsdp_version 2")
    found = {type(part).__name__ for network in method.networks.values() for part in network.module.modules()}
    if unknown := [name for name in _asked_blocks() if name not in found]:
        raise UserError(
            f"no network of this run has a {unknown[0]}, as --fsdp_transformer_layer_cls_to_wrap says",
            f"leave it out for {','.join(BLOCKS)}",
        )
    if not all(network.shardable for network in method.networks.values()):
        raise refused()
    for phase in method.phases:
        if len(phase.networks) > 1:
            raise UserError(
                f"FSDP takes one network per optimizer, this run trains {' and '.join(phase.networks)} together",
                "launch without FSDP, or train one of them",
            )


def refused() -> UserError:
    return UserError(
        "FSDP cannot shard a network that several updates share",
        "launch without FSDP (--processes 1), or leave out --rank and --critic-rank",
    )


def set_up(accelerator: Any, dtype: torch.dtype) -> None:
    """Two of accelerate's defaults that do not suit.

    * In half precision it casts what goes into a unit and comes out, which rounds SDXL's sizes (bfloat16 knows 1020 as
      1024) and losses, and reduces gradients in half precision. Here units compute as DDP under autocast does: the
      gathered weights alone are cast.
    * `--fsdp_cpu_ram_efficient_loading` leaves networks of transformers empty in all processes but the first, frozen
      ones too, which nobody fills. Here every process loads its weights.
    """
    from accelerate.utils import disable_fsdp_ram_efficient_loading
    from torch.distributed.fsdp import MixedPrecisionPolicy

    disable_fsdp_ram_efficient_loading()
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    if dtype == torch.float32:
        policy = MixedPrecisionPolicy()
    else:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def choose_blocks(accelerator: Any, module: nn.Module) -> None:
    """Which parts of a network become units of their own: those that were asked for, or `BLOCKS`, if it has them."""
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP").upper() != "TRANSFORMER_BASED_WRAP":
        return
    found = {type(part).__name__ for part in module.modules()}
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = [name for name in _asked_blocks() or BLOCKS if name in found]


def _asked_blocks() -> list[str]:
    return [name for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if name]


def begin(module: nn.Module) -> None:
    """Let a network's units look at their weights now, while all that learns requires a gradient.

    They would at their first call, which is a critic's in the generator's turn: they would find nothing that learns,
    and reduce its gradients in half precision ever after.
    """
    module._get_fsdp_state()._lazy_init()


def units(module: nn.Module) -> list[Any]:
    """FSDP2's units of a network, the outermost first; none without it."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        return []
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Give back what units have gathered: from here on the network's parameters are those that are trained."""
    for unit in units(module):
        unit.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all of its parts, where it is; every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def parameters_of(networks: Iterable[TrainedNetwork]) -> list[nn.Parameter]:
    """What learns of networks: shards (`DTensor`) under FSDP2."""
    found = []
    for network in networks:
        reshard(network.module)
        found += [value for value in network.model.parameters() if value.requires_grad]
    return found
