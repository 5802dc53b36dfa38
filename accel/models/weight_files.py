"""Weight files: safetensors and pickles of torch, read as weights and nothing else."""

from __future__ import annotations

import math
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingPackage, UserError
from ..files import parse_json

if TYPE_CHECKING:
    import torch

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SUFFIXES = (SAFETENSORS, *PICKLES)
_HEADER_BYTES = 25 << 20
# Safetensors' dtypes as numpy has them; bfloat16 is the upper half of a float32.
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
_NUMPY |= {"I8": "i1", "U8": "u1", "BOOL": "?"}
_STORED = _NUMPY | {"F8_E4M3": "u1"}  # numpy has no such dtype: its bytes
_AGAIN = "the download broke off: get the file again"
# Files of diffusers and transformers: stem, variant, shard, in both of the orders that were in use.
_NAME = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<a>[\w]+))?(?P<shard>-\d{5}-of-\d{5})?(?:\.(?P<b>[\w]+))?"
    r"(?P<suffix>\.safetensors|\.bin)"
)


def read(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file in its own dtype, memory-mapped where the format allows.

    Raises:
        UserError: for a file that is missing, truncated or of another kind, or a pickle with more than weights in it.
    """
    import torch

    _check_name(path)
    state = _read_safetensors(path) if path.suffix == SAFETENSORS else read_pickle(path)
    if isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no weights", "give another file")
    return tensors


def read_groups(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file whose weights are in groups, as "GROUP.name"; a pickle has a dictionary for each group.

    Raises:
        UserError: as `read`.
    """
    import torch

    _check_name(path)
    state = _read_safetensors(path) if path.suffix == SAFETENSORS else read_pickle(path)
    tensors = {}
    for key, value in state.items():
        for name, tensor in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(tensor, torch.Tensor):
                tensors[f"{key}.{name}" if name else str(key)] = tensor
    if not tensors:
        raise UserError(f"{path} holds no weights", "give another file")
    return tensors


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file in float32, as numpy's arrays; torch is needed for pickles and rare dtypes alone.

    Raises:
        UserError: as `read`.
    """
    _check_name(path)
    if path.suffix == SAFETENSORS:
        check_safetensors(path)
        entries = list(_entries(path))
        if all(entry["dtype"] in _NUMPY for _, entry, _ in entries):
            if not entries:
                raise UserError(f"{path} holds no weights", "give another file")
            values = zip(entries, _mapped(path), strict=True)
            return {name: _float32(value, entry["dtype"]) for (name, entry, _), value in values}
    try:
        return {name: value.float().numpy() for name, value in read(path).items()}
    except ImportError:
        raise MissingPackage("torch", f"reading {path.name}", "export") from None


def stored(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a component's safetensors file in its own dtype, mapped into memory and not read yet.

    Those of fp8 are uint8: numpy has no such dtype.
    """
    check_safetensors(path)
    if strange := {entry["dtype"] for _, entry, _ in _entries(path)} - (_STORED.keys() - {"BF16"}):
        raise UserError(f"{path} has weights of type {strange.pop()}", "export the model again")
    return dict(zip((name for name, _, _ in _entries(path)), _mapped(path), strict=True))


def shapes(path: Path) -> dict[str, SimpleNamespace]:
    """Name -> something with the `shape` of every tensor of a file, for messages."""
    if path.suffix == SAFETENSORS:
        return {name: SimpleNamespace(shape=tuple(entry["shape"])) for name, entry, _ in _entries(path)}
    return {name: SimpleNamespace(shape=tuple(value.shape)) for name, value in read(path).items()}


def _entries(path: Path) -> Iterator[tuple[str, dict, int]]:
    """(name, entry of the header, first byte in the file) of every tensor of a safetensors file."""
    length, header = read_header(path)
    try:
        for name, entry in (header or {}).items():
            if name != "__metadata__":
                yield name, entry, 8 + length + int(entry["data_offsets"][0])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise _no_safetensors(path) from None


def _mapped(path: Path) -> Iterator[np.ndarray]:
    data = np.memmap(path, np.uint8, "r")
    for _, entry, start in _entries(path):
        dtype, shape = np.dtype(_STORED[entry["dtype"]]), tuple(entry["shape"])
        size = math.prod(shape) * dtype.itemsize
        if start + size > len(data):
            raise _no_safetensors(path)
        yield data[start : start + size].view(dtype).reshape(shape)


def _float32(value: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (value.astype(np.uint32) << 16).view(np.float32)
    return value.astype(np.float32)


def _check_name(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is not a weight file", f"one of: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"no such file: {path}", "check the path")


def check_safetensors(path: Path) -> None:
    """Compare a file's size with what its header promises, without reading weights.

    Raises:
        UserError: naming the file, for one that is truncated or not a safetensors file.
    """
    size = path.stat().st_size
    length, header = read_header(path)
    try:
        ends = [entry["data_offsets"][1] for key, entry in (header or {}).items() if key != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise _no_safetensors(path) from None
    if header is None or size < wanted:
        raise UserError(f"{path} is truncated: it has {size:,} bytes where its header says {wanted:,}", _AGAIN)


def metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; empty for a pickle, which has none."""
    header = read_header(path)[1] if path.suffix == SAFETENSORS else None
    found = (header or {}).get("__metadata__", {})
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def read_header(path: Path) -> tuple[int, dict | None]:
    """The header of a safetensors file (8 bytes of length, JSON, data), and its length; None where the file ends in it.

    Raises:
        UserError: for a file of another format.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length < size and length > _HEADER_BYTES:
                raise ValueError("no header is that long")
            header = parse_json(file.read(length)) if length < size else None
    except (struct.error, ValueError):
        raise _no_safetensors(path) from None
    if not (header is None or isinstance(header, dict)):
        raise _no_safetensors(path)
    return length, header


def _no_safetensors(path: Path) -> UserError:
    return UserError(f"{path} is not a safetensors file ({path.stat().st_size:,} bytes)", _AGAIN)


def variants(folder: Path) -> dict[str | None, list[Path]]:
    """The weight files of a component's folder by their variant; None for the plain ones."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        match = _NAME.fullmatch(path.name)
        if match:
            found.setdefault(match["a"] or match["b"], []).append(path)
    return found


def chosen_files(folder: Path, variant: str | None = None) -> tuple[list[Path], str | None]:
    """The weight files of a component's folder and their variant ("fp16", or None for the plain ones).

    Safetensors go before pickles. With `variant` None the plain files are taken, or the only variant that is there.

    Raises:
        UserError: when the variant is not there; the error lists those that are.
    """
    found = variants(folder)
    if variant is None and None not in found:
        useful = [name for name in found if name != "non_ema"]
        variant = useful[0] if len(useful) == 1 else None
    if variant is not None and variant not in found:
        names = ", ".join(sorted(name or "the plain one" for name in found)) or "nothing"
        raise UserError(f"{folder} has no variant {variant!r}", f"it has: {names}")
    files = found.get(variant, [])
    return [path for path in files if path.suffix == SAFETENSORS] or files, variant


def aliases(name: str) -> tuple[str, ...]:
    """Names of one weight: transformers once kept CLIP's text model a level deeper, and files of both times exist."""
    return (name, name.removeprefix("text_model."), f"text_model.{name}")


def is_code(error: BaseException | None) -> bool:
    """Whether torch refused a pickle because it holds more than weights."""
    while error is not None:
        if isinstance(error, pickle.UnpicklingError) or "eights only" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def refused(what: Path) -> UserError:
    return UserError(
        f"{what} holds a pickle with more than weights in it; refused, because it could run code",
        "get the model as .safetensors",
    )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_safetensors(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", _AGAIN) from None


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle of torch: tensors, and plain values such as texts and numbers.

    Raises:
        UserError: for a file that cannot be read, holds no dictionary, or has more than data in it.
    """
    import torch

    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError) as error:
            if is_code(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except Exception as error:
        if is_code(error):
            raise refused(path) from None
        line = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read: {line}", _AGAIN) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} does not hold a dictionary of weights", "give another file")
    return state


def readable(load: Callable[[], torch.nn.Module], folder: Path) -> torch.nn.Module:
    """Run a loader and turn its many ways of failing into one sentence."""
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, SafetensorError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if is_code(error):
            raise refused(folder) from None
        raise UserError(
            f"{folder} cannot be loaded: {first[:300]}", "the files may be damaged or incomplete; get them again"
        ) from None
