"""Where a model comes from: a diffusers pipeline folder or a hub id, read one component at a time."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .assets import resolve
from .errors import UserError
from .files import digest_of, read_json, sha256
from .lora import COMPONENTS, LoraFile, check_components, fuse, lora_file
from .topology import identify

_WEIGHTS = (".safetensors", ".bin")
_SUPPORTED = "Stable Diffusion 1.x, 2.x, SDXL and their distilled students are supported"


@dataclass(frozen=True)
class Source:
    """A diffusers pipeline folder.

    Attributes:
        path: the folder.
        name: what to call it (folder name or hub id).
        index: model_index.json.
        loras: LoRA files that `load` adds to the weights.
    """

    path: Path
    name: str
    index: Mapping[str, Any]
    loras: tuple[LoraFile, ...] = ()

    def has(self, component: str) -> bool:
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)

    def config(self, component: str) -> dict[str, Any]:
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        config = read_json(self.path / component / name, f"the {component} config")
        if not isinstance(config, dict):
            raise UserError(f"{self.path / component / name} is no table", "get the file again")
        return config

    def sampler(self) -> dict[str, Any] | None:
        """Sampling constants that a distilled pipeline carries along (`sampler.json`), or None."""
        path = self.path / "sampler.json"
        return read_json(path, "sampler.json") if path.is_file() else None

    def load(self, component: str) -> nn.Module:
        """Load one component in float32, LoRA files fused; weights only, never code."""
        library, class_name = self.index[component]
        if library not in ("diffusers", "transformers"):
            raise UserError(f"{component} is a {library}.{class_name}, which needs that package's code", _SUPPORTED)
        cls = getattr(importlib.import_module(library), class_name, None)
        if cls is None:
            raise UserError(f"{component}: the installed {library} has no {class_name}", f"pip install -U {library}")
        folder = self.path / component
        options = {"torch_dtype" if library == "diffusers" else "dtype": torch.float32}
        options |= dict(local_files_only=True, output_loading_info=True)
        model, info = _readable(lambda: cls.from_pretrained(folder, **options), folder)
        # Both libraries fill what is missing with random numbers, and only log it.
        lost = sorted(info["missing_keys"])
        if lost:
            raise UserError(
                f"{folder}: {len(lost)} weights are missing, the first one is {lost[0]}",
                "the files may be damaged, or of another model; get them again",
            )
        if self.loras and component in COMPONENTS:
            fuse(model, component, self.loras, unet_config=self.config("unet"))
        return model.eval()

    def weight_files(self, component: str) -> list[Path]:
        return sorted(p for p in (self.path / component).glob("*") if p.suffix in _WEIGHTS)

    def digest(self, components: list[str]) -> str:
        """sha256 over the weight files of the named components, and over all LoRA files with their scales."""
        files: dict[str, Any] = {f"{name}/{p.name}": sha256(p) for name in components for p in self.weight_files(name)}
        return digest_of(files | {"loras": [file.record() for file in self.loras]} if self.loras else files)

    @property
    def family(self) -> str:
        config = self.config("unet")
        if config.get("addition_embed_type") == "text_time":
            return "sdxl"
        return "sd2" if config.get("use_linear_projection") else "sd1"

    @property
    def topology(self) -> str:
        found = identify(self.config("unet"))
        return found.name if found else "custom"


def open_source(model: str | Path, loras: Sequence[str | Path | LoraFile] = ()) -> Source:
    """Open a diffusers pipeline folder, fetch one from the hub, or take the shipped one (`digits`).

    Args:
        model: which one.
        loras: LoRA files to fuse into it, each as FILE or FILE=SCALE (`accel.lora`).

    Raises:
        UserError: for a path that does not exist, a folder that is no pipeline, a pipeline of another family, or a
            LoRA file that cannot be read or is for components that the pipeline does not have.
    """
    files = tuple(lora_file(spec) for spec in loras)
    asked, model = str(model), resolve(model)
    path = Path(model)
    if not path.exists():
        if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
            raise UserError(f"no such folder: {model}", "give a diffusers pipeline folder or a hub id such as org/name")
        path = _download(str(model))
    if path.is_file():
        raise UserError(
            f"{path} is a file, not a pipeline folder",
            "convert it with diffusers: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)",
        )
    if (path / "accel.json").is_file():
        raise UserError(f"{path} is a bundle already", f"accel run {path} --prompt ...")
    if not (path / "model_index.json").is_file():
        raise UserError(
            f"{path} is no diffusers pipeline: it has no model_index.json",
            "save one with pipeline.save_pretrained(FOLDER)",
        )
    index = read_json(path / "model_index.json", "model_index.json")
    if not isinstance(index, dict):
        raise UserError(f"{path / 'model_index.json'} is no table", "save it with pipeline.save_pretrained(FOLDER)")
    source = Source(path, path.resolve().name if Path(asked).exists() else asked, index, files)
    for needed in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not source.has(needed):
            raise UserError(f"{path} is a {index.get('_class_name')} without {needed}", _SUPPORTED)
    if files:
        check_components(files, [name for name in COMPONENTS if source.has(name)], source.config("unet"))
    return source


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    folders = ("unet", "vae", "text_encoder*", "tokenizer*", "scheduler")
    allow = ["*.json", "*.txt", *(f"{f}/*.{s}" for f in folders for s in ("json", "txt", "safetensors", "model"))]
    try:
        return Path(snapshot_download(repo, allow_patterns=allow, ignore_patterns=["*.fp16.*", "*non_ema*"]))
    except Exception as error:
        raise UserError(
            f"{repo} is neither a local folder nor to be had from the hub ({type(error).__name__}: {error})",
            "check the spelling and the network, or give a folder",
        ) from None


def _readable(load: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """Run a loader and turn its many ways of failing into one sentence."""
    import pickle

    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, SafetensorError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if any(isinstance(e, pickle.UnpicklingError) or "eights only" in str(e) for e in _chain(error)):
            raise UserError(
                f"{folder} holds a pickle with more than weights in it; refused, because it could run code",
                "get the model as .safetensors",
            ) from None
        raise UserError(
            f"{folder} cannot be loaded: {first[:300]}", "the files may be damaged or incomplete; get them again"
        ) from None


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
