"""The config files of a model from anywhere: data that decides shapes, never code.

diffusers and transformers also read fields that name Python modules, hub repositories and kernels. Such fields are
stripped with a note before a library sees the file; classes come from the table of component kinds alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from ..bundle.kinds import KINDS
from ..bundle.limits import LARGEST
from ..errors import Notice, UserError
from ..files import inside, read_json

_T = TypeVar("_T")
# Fields by which a config has Python code looked up, on disk or on the hub.
_CODE = frozenset(
    "auto_map trust_remote_code custom_pipeline custom_pipelines code_revision attn_implementation "
    "_attn_implementation _attn_implementation_internal _attn_implementation_autoset experts_implementation "
    "_experts_implementation use_kernels kernel_config _auto_class auto_class".split()
)
_PLAIN = (None, "eager", "sdpa")  # attention that torch itself has: dropped too, and not worth a note
_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".md", ".msgpack", "")
_MOST_LAYERS = 512
SUPPORTED = "Stable Diffusion 1.x, 2.x, SDXL and their distilled students are supported"


def network_class(component: str, library: str, class_name: str, more: tuple[str, ...] = ()) -> Any:
    """The class of a pipeline's part, out of a list.

    Args:
        more: classes beside those of the component kinds.

    Raises:
        UserError: for any other class, or one that the installed library does not have.
    """
    kinds = [kind for kind in KINDS.values() if component in (*kind.names, kind.part) and kind.library == library]
    if library not in ("diffusers", "transformers") and not kinds:
        raise UserError(f"{component} is a {library}.{class_name}, which needs that package's code", SUPPORTED)
    known = list(dict.fromkeys([name for kind in kinds for name in kind.classes] + list(more)))
    if class_name not in known:
        fix = f"supported: {', '.join(known)}" if known else SUPPORTED
        raise UserError(f"{component} is a {class_name} of {library}, which is not supported", fix)
    module = next((kind.module for kind in kinds if kind.module), library)
    found = getattr(import_module(module), class_name, None)
    if found is None:
        raise UserError(f"{component}: the installed {library} has no {class_name}", f"pip install -U {library}")
    return found


def read_config(path: Path, what: str, *, network: bool = True) -> dict[str, Any]:
    """A config without the fields that lead to code, its sizes within what a network can have.

    Args:
        network: whether it is a network's, and not a scheduler's: those have infinities and long lists.

    Raises:
        UserError: for a file that is not a JSON object, a quantized model, or an absurd size.
    """
    config = read_json(path, what)
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object", "get the file again")
    if config.get("quantization_config") is not None:
        raise UserError(f"{path}: its weights are quantized (quantization_config)", "get the model in float")
    config, removed = stripped(config)
    if removed:
        note(path, removed)
    if network:
        _check_sizes(config, path)
    return config


def built(path: Path, name: str, build: Callable[[], _T]) -> _T:
    """What a library builds from a config; libraries check their configs by failing somewhere in the middle.

    Raises:
        UserError: for a config from which it builds no `name`.
    """
    try:
        return build()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"{path} does not describe a {name}: {lines[0][:300]}", "get the file again") from error


def stripped(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config without the fields that lead to code, at any depth, and the names of those that would have."""
    kept: dict[str, Any] = {}
    removed: list[str] = []
    for key, value in config.items():
        if key in _CODE:
            removed += [key] if key.endswith("autoset") or value not in _PLAIN else []
        elif isinstance(value, dict):
            kept[key], inner = stripped(value)
            removed += [f"{key}.{name}" for name in inner]
        else:
            kept[key] = value
    return kept, removed


def note(path: Path, removed: list[str]) -> None:
    text = f"{path}: {', '.join(removed)} would load code, and is left out"
    warnings.warn(text, Notice, stacklevel=4)


def _check_sizes(config: Mapping[str, Any], path: Path) -> None:
    """Refuse what would make a library build for hours, or take all memory, before a weight is read."""

    def numbers(value: Any) -> Iterator[float]:
        if isinstance(value, list):
            yield 0 if len(value) <= _MOST_LAYERS else math.inf
            for item in value[:_MOST_LAYERS]:
                yield from numbers(item)
        elif isinstance(value, (int, float)):
            yield abs(value)

    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, path)
        most = _MOST_LAYERS if "layers" in key else LARGEST
        if any(not number <= most for number in numbers(value)):
            raise UserError(f"{path}: {key} is {value!r:.80}, where {most} is the most", "get the file again")


@contextlib.contextmanager
def without_code(folder: Path) -> Iterator[Path]:
    """A folder that a library may read: the same one, or links to its files beside configs without code fields.

    Raises:
        UserError: for a config that is not JSON, and for a file that is none, such as a pipe or a device.
    """
    _check_ordinary(folder)
    configs = {path.name: read_json(path, f"{path.name} of {folder.name}") for path in sorted(folder.glob("*.json"))}
    changed = {}
    for name, config in configs.items():
        if name.endswith(".index.json"):
            _check_index(folder / name, config)
        elif isinstance(config, dict) and name not in ("vocab.json", "tokenizer.json"):
            kept, removed = stripped(config)
            if kept != config:
                changed[name] = kept
            if removed:
                note(folder / name, removed)
    if not changed:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="accel-config-") as name:
        clean = Path(name) / folder.name
        clean.mkdir()
        for path in folder.iterdir():
            if path.is_file() and path.name not in changed and path.suffix in _SUFFIXES:
                (clean / path.name).symlink_to(path.resolve())
        for name, config in changed.items():
            (clean / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        yield clean


def copy_folder(folder: Path, to: Path) -> None:
    """Copy what a folder of a pipeline holds as data: no code, no hidden files, configs without code fields."""
    left = [p.name for p in folder.iterdir() if p.suffix not in _SUFFIXES or (p.is_dir() and p.name[0] != ".")]
    if left:
        text = f"{folder}: {', '.join(sorted(left)[:5])} is neither weights nor settings, and is left out"
        warnings.warn(text, Notice, stacklevel=3)
    with without_code(folder) as clean:
        to.mkdir(parents=True)
        for path in sorted(clean.iterdir()):
            if path.is_file() and path.suffix in _SUFFIXES and not path.name.startswith("."):
                shutil.copyfile(path, inside(to, path.name, "the file"))


def _check_ordinary(folder: Path) -> None:
    try:
        for entry in os.scandir(folder):
            mode = entry.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise UserError(f"{entry.path} is not an ordinary file", "get the folder again")
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be read: {error.strerror}", "get the folder again"
        ) from None


def _check_index(path: Path, index: Any) -> None:
    """The shards that an index names lie beside it."""
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise UserError(f"{path} has no weight_map", "get the file again")
    for name in set(map(str, names.values())):
        if Path(name).name != name or not (path.parent / name).is_file():
            raise UserError(f"{path} names {name!r:.120}, which is no file beside it", "get the folder again")


def clip_tokenizer(folder: Path, *, fast: bool = False) -> Any:
    """transformers' tokenizer of a pipeline's `tokenizer/` folder: CLIP's own class, whatever the folder asks for.

    Args:
        fast: the one with `backend_tokenizer`, which transformers 4 keeps apart.

    Raises:
        UserError: for a folder that holds none.
    """
    import transformers

    cls = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer) if fast else transformers.CLIPTokenizer
    with without_code(folder) as clean:
        try:
            return cls.from_pretrained(clean, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the package raises bare Exception
            line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            fix = "copy the tokenizer folder of the original pipeline again"
            raise UserError(f"{folder} is not a CLIP tokenizer: {line[:300]}", fix) from None
