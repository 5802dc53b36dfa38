"""Checkpoints of a training run: whole or not at all, rotated, and exact.

<run>/checkpoints/step-000500/
    state.json                  step, recipe, global batch, versions, the scaler of float16
    unet/                       the network as diffusers writes it, so that it can be loaded as it is
    unet_ema/                   its average, where there is one
    optimizer-unet.pt           one per optimizer phase
    scheduler-unet.pt
    rng-0.pt                    random states of every rank
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from accel.errors import UserError
from accel.files import read_json, readable

from ..settings import Recipe
from .method import TrainedNetwork

_PARTIAL = ".partial"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_NAME = re.compile(r"step-(\d+)")

# What may differ between the run that wrote a checkpoint and the one that goes on from it: none of these changes the
# weights, except that another device or kernel may round differently.
FREE = frozenset(
    "batch accumulation checkpoint_every keep sample_every sample_prompts sample_steps sample_guidance log workers "
    "cache attention compile gradient_checkpointing save_dtype".split()
)

# Tensor names that earlier versions wrote, by their last part.
_RENAMED = {"told": "step_embedding"}


def settings(recipe: Recipe, world: int) -> dict[str, Any]:
    """What must be equal to go on from a checkpoint, as JSON-able data."""
    kept = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in FREE}
    if recipe.lr_schedule == "constant":
        kept.pop("steps")
    if not recipe.qat:
        kept = {name: value for name, value in kept.items() if not name.startswith("qat")}
    kept |= recipe.in_effect()
    # Where a cache lies does not matter; whether there is one does: it keeps few placements, perhaps in float16.
    kept["cached"] = recipe.cache != "none"
    return kept | {"method": recipe.method, "global_batch": recipe.batch * recipe.accumulation * world}


def all_of(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; half-written ones are not among them."""
    found = [(int(match[1]), path) for path in (run / "checkpoints").glob("*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def tensors_of(model: nn.Module, *, trained_only: bool = True) -> dict[str, torch.Tensor]:
    """Full CPU tensors of a model, whatever wraps or shards it; every rank must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return {name: tensor.contiguous().clone() for name, tensor in get_model_state_dict(model, options=options).items()}


def write(
    run: Path,
    step: int,
    *,
    networks: Mapping[str, TrainedNetwork],
    averages: Mapping[str, Sequence[torch.Tensor]],
    optimizers: Mapping[str, Any],
    schedulers: Mapping[str, Any],
    kept: Mapping[str, Any],
    accelerator: Any,
    keep: int,
) -> Path:
    """Write `step-N` beside the others, then remove the oldest beyond `keep` (0 keeps all). Every rank calls it.

    Raises:
        UserError: when the disk does not take it; the checkpoints before it are intact.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    final = run / "checkpoints" / f"step-{step:06d}"
    partial = final.with_name(f".{final.name}{_PARTIAL}")
    main = accelerator.is_main_process
    with _saving(partial):
        if main:
            _sweep(final.parent)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        _save(_random_state(), partial / f"rng-{accelerator.process_index}.pt")
        for name, network in networks.items():
            tensors = tensors_of(network.model)
            if main:
                _write_network(network.model, tensors, partial / name)
            if name in averages:
                shadow = {key: whole(value) for key, value in zip(_trained(network.model), averages[name], strict=True)}
                if main:
                    _write_network(network.model, tensors | shadow, partial / f"{name}_ema")
        for phase, optimizer in optimizers.items():
            models = nn.ModuleDict({name: networks[name].model for name in kept["phases"][phase]})
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            state = get_optimizer_state_dict(models, optimizer, options=options)
            if main:
                _save(state, partial / f"optimizer-{phase}.pt")
                _save(schedulers[phase].state_dict(), partial / f"scheduler-{phase}.pt")
        accelerator.wait_for_everyone()
        if main:
            scaler = {"scaler": accelerator.scaler.state_dict()} if accelerator.scaler is not None else {}
            (partial / "state.json").write_text(json.dumps(dict(kept) | scaler | {"step": step}, indent=2) + "\n")
            readable(partial)
            _to_disk(partial)
            if final.exists():
                _remove(final)
            os.replace(partial, final)
            for old in all_of(run)[:-keep] if keep else ():
                _remove(old)
    accelerator.wait_for_everyone()
    return final


@contextlib.contextmanager
def _saving(partial: Path) -> Iterator[None]:
    """What fails, or is interrupted, leaves nothing behind; a full disk is an error for people."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):  # safetensors wraps what the system says
            said = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0][:200]
            raise UserError(
                f"the checkpoint {partial.parent} cannot be written: {said}; the ones before it are intact",
                "free some space and start again: the run goes on from the last one; --keep 1 needs the least",
            ) from error
        raise


def _save(value: Any, path: Path) -> None:
    try:
        torch.save(value, path)
    except RuntimeError as error:  # a C++ stream that failed, without saying why
        raise OSError(f"{path.name}: {error}") from error


def _to_disk(folder: Path) -> None:
    """Before the rename, or a power cut could leave the name without the content."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(folder: Path) -> None:
    """Renamed first: a kill in the middle must not leave half a checkpoint under its name."""
    gone = folder.with_name(f".{folder.name}.old{_PARTIAL}")
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what killed runs left half-written, or half-removed."""
    for path in folder.glob(f".*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def read(
    path: Path,
    *,
    networks: Mapping[str, TrainedNetwork],
    averages: Mapping[str, Sequence[torch.Tensor]],
    optimizers: Mapping[str, Any],
    schedulers: Mapping[str, Any],
    kept: Mapping[str, Any],
    accelerator: Any,
) -> int:
    """Put everything back as it was; returns the number of steps done.

    Raises:
        UserError: when the checkpoint was written with other settings, naming each, or is damaged.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

    state = read_json(path / "state.json", "the checkpoint's state.json")
    now = kept["settings"]
    then = {"cached": now.get("cached")} | state["settings"]  # checkpoints of earlier versions do not say
    other = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    if other:
        listed = "; ".join(f"{name} was {then.get(name)!r}, is now {now.get(name)!r}" for name in other)
        raise UserError(
            f"{path} was written with other settings: {listed}",
            f"use the same settings, another --run folder, or delete {path.parent}",
        )
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
    try:
        for name, network in networks.items():
            tensors = load_file(path / name / WEIGHTS)
            tensors = {_renamed(key): value for key, value in tensors.items()}
            set_model_state_dict(network.model, tensors, options=options)
            if name in averages:
                _fill(averages[name], load_file(path / f"{name}_ema" / WEIGHTS), _trained(network.model))
        for phase, optimizer in optimizers.items():
            models = nn.ModuleDict({name: networks[name].model for name in kept["phases"][phase]})
            moments = torch.load(path / f"optimizer-{phase}.pt", weights_only=True)
            moments["state"] = {_renamed(key): value for key, value in moments["state"].items()}
            for group in moments["param_groups"]:
                group["params"] = [_renamed(key) for key in group["params"]]
            set_optimizer_state_dict(models, optimizer, moments, options=options)
            schedulers[phase].load_state_dict(torch.load(path / f"scheduler-{phase}.pt", weights_only=True))
        random_file = path / f"rng-{accelerator.process_index}.pt"
        if random_file.is_file():
            _set_random_state(torch.load(random_file, weights_only=True))
        if accelerator.scaler is not None and "scaler" in state:
            accelerator.scaler.load_state_dict(state["scaler"])
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"{path} cannot be read: {error}", f"delete {path}; the one before is used then") from None
    return state["step"]


def _renamed(name: str) -> str:
    head, dot, last = name.rpartition(".")
    return head + dot + _RENAMED.get(last, last)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has divided its parameters among processes."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A full CPU tensor, of a shard of it too."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().cpu().contiguous()


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _write_network(model: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir()
    if hasattr(model, "save_config") and len(tensors) == len(model.state_dict()):
        model.save_config(folder)
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def _fill(shadow: Sequence[torch.Tensor], tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
    for place, name in zip(shadow, names, strict=True):
        value = tensors[name].to(place.device)
        if hasattr(place, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, place.device_mesh, place.placements)
        place.copy_(value)


def _random_state() -> dict[str, Any]:
    """Of every generator that a layer such as dropout may use; plain types, so that it loads as weights only."""
    kind, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(numbers), gauss],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    kind, keys, *rest = state["numpy"]
    version, numbers, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate((version, tuple(numbers), gauss))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
