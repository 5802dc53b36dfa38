"""Checkpoints of a training run: whole or not at all, rotated, and exact.

<run>/checkpoints/step-000500/
    state.json                  step, recipe, global batch, versions, the scaler of float16, digests of all files
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
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from accel import records
from accel.errors import UserError
from accel.files import digest_of, inside, read_json, readable, replace_folder, settle, sha256

from ..settings import Recipe
from . import sharding
from .method import TrainedNetwork

_PARTIAL = ".partial"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_NAME = re.compile(r"step-(\d+)")

# What may differ between the run that wrote a checkpoint and the one that goes on from it: none of these changes the
# weights, except that another device or kernel may round differently.
FREE = frozenset(
    "batch accumulation checkpoint_every keep sample_every sample_prompts sample_steps sample_guidance log workers "
    "validation_every cache attention compile gradient_checkpointing save_dtype tf32 channels_last fused "
    "vae_batch".split()
)

# Of an optimizer's group: which kernel does it, the device's choice and not that of the run before.
_KERNEL = ("fused", "foreach")

# Tensor names that earlier versions wrote, by their last part.
_RENAMED = {"told": "step_embedding"}


# Fields that checkpoints of earlier versions do not have; at these defaults they change nothing.
LATER = frozenset(
    "decoupled score_column min_score min_size buckets bucket_step bucket_least validation data_model data_steps "
    "data_guidance data_images half_norms vae_dtype".split()
)


def as_before(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe, without those that came later and have the value at which nothing changes."""
    later = {field.name: field.default for field in dataclasses.fields(recipe) if field.name in LATER}
    values = dataclasses.asdict(recipe)
    return {name: value for name, value in values.items() if name not in later or value != later[name]}


def settings(recipe: Recipe, world: int) -> dict[str, Any]:
    """What must be equal to go on from a checkpoint, as JSON-able data."""
    kept = {name: value for name, value in as_before(recipe).items() if name not in FREE}
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
            tidy(run)
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
            files = {
                file.relative_to(partial).as_posix(): {"sha256": sha256(file), "bytes": file.stat().st_size}
                for file in sorted(partial.rglob("*"))
                if file.is_file()
            }
            state = json.loads(json.dumps(dict(kept) | scaler | {"step": step, "files": files}))  # tuples as lists
            (partial / "state.json").write_text(json.dumps(state | {"digest": _digest(state)}, indent=2) + "\n")
            readable(partial)
            _to_disk(partial)
            replace_folder(final, partial)
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


def tidy(run: Path) -> None:
    """Remove what killed runs left half-written, or half-removed; a checkpoint that was being replaced comes back."""
    folder = run / "checkpoints"
    for path in folder.glob(".step-*.previous"):
        settle(folder / path.name.removeprefix(".").removesuffix(".previous"))
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
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    fix = _instead(path)
    state = _proven(path, fix)
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
    parts = StateDictOptions(ignore_frozen_params=True)
    try:
        for name, network in networks.items():
            own = get_model_state_dict(network.model, options=parts)
            wanted = {key: value.shape for key, value in own.items()}  # the whole shape, of sharded tensors too
            tensors = {_renamed(key): value for key, value in load_file(path / name / WEIGHTS).items()}
            _check_tensors(tensors, wanted, name)
            set_model_state_dict(network.model, tensors, options=options)
            if name in averages:
                shadow = load_file(path / f"{name}_ema" / WEIGHTS)
                _check_tensors({_renamed(key): value for key, value in shadow.items()}, wanted, f"{name}_ema")
                _fill(averages[name], shadow, _trained(network.model))
        for phase, optimizer in optimizers.items():
            models = nn.ModuleDict({name: networks[name].model for name in kept["phases"][phase]})
            moments = torch.load(path / f"optimizer-{phase}.pt", weights_only=True)
            moments["state"] = {_renamed(key): value for key, value in moments["state"].items()}
            for group in moments["param_groups"]:
                group["params"] = [_renamed(key) for key in group["params"]]
                group |= {name: optimizer.defaults[name] for name in _KERNEL if name in optimizer.defaults}
            _check_finite(moments, f"optimizer-{phase}")
            set_optimizer_state_dict(models, optimizer, moments, options=options)
            schedule = torch.load(path / f"scheduler-{phase}.pt", weights_only=True)
            _check_finite(schedule, f"scheduler-{phase}")
            schedulers[phase].load_state_dict(schedule)
        random_file = path / f"rng-{accelerator.process_index}.pt"
        if random_file.is_file():
            _set_random_state(torch.load(random_file, weights_only=True))
        if accelerator.scaler is not None and "scaler" in state:
            _check_finite(state["scaler"], "the scaler")
            accelerator.scaler.load_state_dict(state["scaler"])
    except Exception as error:  # whatever the libraries say about a file that is not what they expect
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{path} cannot be read: {line[:300]}", fix) from None
    return state["step"]


def _instead(path: Path) -> str:
    """What to do about a checkpoint that is damaged."""
    before = [other for other in all_of(path.parents[1]) if _step(other) < _step(path)]
    if not before:
        return f"there is none before it: delete {path}, and the run starts anew"
    return f"delete {path}; the run goes on from the one before it then, {before[-1]}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _proven(path: Path, fix: str) -> dict[str, Any]:
    """state.json of a checkpoint, all of whose files are as they were written. Earlier versions kept no digests."""
    state = read_json(path / "state.json", "the checkpoint's state.json")
    try:
        records.read({"settings": dict, "step": int}, state, "state.json")
        if state["step"] != _step(path):
            raise ValueError(f"it is of step {state['step']}")
        if "files" in state:
            records.read({"files": Mapping[str, {"sha256": str, "bytes": int}], "digest": str}, state, "state.json")
            if state["digest"] != _digest(state):
                raise ValueError("state.json was changed")
            for name, entry in state["files"].items():
                file = inside(path, name, "the checkpoint's file")
                if not file.is_file() or file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
                    raise ValueError(f"{name} is missing or was changed")
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", fix) from None
    return state


def _digest(state: Mapping[str, Any]) -> str:
    return digest_of({key: value for key, value in state.items() if key != "digest"})


def _check_tensors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Size], name: str) -> None:
    """Every tensor by its name and shape, and finite."""
    for key in sorted({*found, *wanted}):
        if key not in found or key not in wanted:
            raise ValueError(f"{name}: {key} {'is missing' if key in wanted else 'is no weight of this network'}")
        if found[key].shape != wanted[key]:
            raise ValueError(f"{name}: {key} has shape {list(found[key].shape)}, not {list(wanted[key])}")
    _check_finite(found, name)


def _check_finite(value: Any, name: str) -> None:
    """Every number and tensor in it, at any depth."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_finite(entry, f"{name}: {key}")
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _check_finite(entry, name)
    elif isinstance(value, (float, torch.Tensor)) and not bool(torch.as_tensor(value).isfinite().all()):
        raise ValueError(f"{name} is not finite")


def _renamed(name: str) -> str:
    head, dot, last = name.rpartition(".")
    return head + dot + _RENAMED.get(last, last)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has divided its parameters among processes."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A full CPU tensor, of a shard of it too."""
    return sharding.whole(tensor).detach().cpu().contiguous()


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
