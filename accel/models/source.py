"""Where a model comes from: a pipeline folder, a hub id, a single file, or a folder with parts taken from elsewhere."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..assets import is_hub_id, resolve
from ..errors import Notice, UserError, printable
from ..files import digest_of, read_json, settle, sha256
from ..sampling.samplers import own_sampler
from . import few_step as families
from . import hub, parts, single_file
from . import weight_files as weights
from .config_files import SUPPORTED, copy_folder, network_class, note, read_config, stripped, without_code
from .edm.folder import PIPELINE as EDM
from .embeddings import Embedding, EmbeddingSpec
from .embeddings.into_model import TEXT_ENCODERS, add_tokens, add_vectors, learned, tokenizer_of
from .ip_adapter.into_source import completed, note_left_out, with_ip_adapter
from .lora import COMPONENTS, LoraFile, check_components, fuse, lora_file
from .topology import identify

_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Source:
    """A diffusers pipeline folder, some of whose parts may lie elsewhere.

    Attributes:
        path: the folder.
        name: what to call it (folder name or hub id).
        index: model_index.json, with the classes of the parts that lie elsewhere.
        loras: LoRA files that `load` adds to the weights.
        files: component -> weight file to load instead of the folder's; a single file stands for all networks.
        folders: component -> folder to load instead.
        variant: of the weight files, such as "fp16"; None for the plain ones, or the only one there is.
        few_step: which few-step family it is of, or "none", where the caller says so (`accel.models.few_step`).
        ip_adapter: file of an IP-Adapter that `load` puts into the UNet.
        embeddings: learned tokens that `copy` adds to the tokenizers, and `load` to the text encoders.
        clip_skips: how many layers before the last one the text encoder has further outputs.
    """

    path: Path
    name: str
    index: Mapping[str, Any]
    loras: tuple[LoraFile, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)
    variant: str | None = None
    few_step: str | None = None
    ip_adapter: Path | None = None
    embeddings: tuple[Embedding, ...] = ()
    clip_skips: tuple[int, ...] = ()

    def has(self, component: str) -> bool:
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)

    def folder(self, component: str) -> Path:
        return self.folders.get(component, self.path / component)

    def config(self, component: str) -> dict[str, Any]:
        if component == "unet" and "unet" in self.files:
            return dict(self._unet_config)
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        path = self.folder(component) / name
        return read_config(path, f"the {component} config", network=component != "scheduler")

    @cached_property
    def _unet_config(self) -> dict[str, Any]:
        base = replace(self, files={}).config("unet")
        return single_file.unet_config(weights.read(self.files["unet"]), base, self.files["unet"].name)

    def scheduler(self) -> dict[str, Any]:
        """The scheduler config, with the class that model_index.json names and what few-step weights ask for."""
        config = self.config("scheduler") | {"_class_name": self.index["scheduler"][1]}
        marks = single_file.marks(self.files["unet"]) if "unet" in self.files else {}
        found = families.recognise(self.few_step, self.parts, self.name, config)
        return config | marks | (dict(found.family.fields) if found else {})

    def scheduler_for(self, constants: Mapping[str, Any]) -> dict[str, Any]:
        """The scheduler config with which diffusers draws what these sampling constants say."""
        config = self.scheduler()
        return families.scheduler_of(config, constants) or config

    @property
    def parts(self) -> list[Path]:
        """The UNet's weight file and the LoRA files, where they are not the folder's own."""
        return [*(path for name, path in self.files.items() if name == "unet"), *(file.path for file in self.loras)]

    def recognised(self) -> families.Found | None:
        """The few-step family of the model, by the names of its files, or by folder and scheduler."""
        return families.recognise(self.few_step, self.parts, self.name, self.scheduler())

    def sampler(self) -> dict[str, Any] | None:
        """Sampling constants that the model carries along: its few-step weights', or `sampler.json`; that of a LoRA
        before all others."""
        path, of_loras = self.path / "sampler.json", [file.path.with_name("sampler.json") for file in self.loras]
        by_file = families.recognise(self.few_step, self.parts, "", {})
        if self.few_step is None and (carried := [file for file in of_loras if file.is_file()]):
            path, by_file = carried[-1], None
        if by_file is None and path.is_file():
            if not isinstance(constants := read_json(path, "sampler.json"), dict):
                raise UserError(f"{path} is not a JSON object", 'write {"name": "ddim", "steps": 25, "guidance": 7.5}')
            return constants
        found = by_file or self.recognised()
        if found is None:
            return None
        embeds = self.config("unet").get("time_cond_proj_dim") is not None
        made = found.family.constants(found.steps, self.usual_guidance if embeds else 0.0)
        return made | ({} if made["name"] else {"name": own_sampler(self.scheduler())})

    @property
    def usual_guidance(self) -> float:
        """What diffusers' pipeline of this kind guides with by default; none for an LCM without that input."""
        if self.config("unet").get("time_cond_proj_dim") is None and self.index["scheduler"][1] == "LCMScheduler":
            return 0.0
        usual = {"LatentConsistencyModelPipeline": 8.5}.get(str(self.index.get("_class_name")))
        return usual or (5.0 if self.family == "sdxl" else 7.5)

    def load(self, component: str) -> nn.Module:
        """Load one component in float32, LoRA files fused; weights only, never code."""
        cls, library, class_name = self.network_class(component), *self.index[component]
        if component in self.files:
            file = self.files[component]
            state = weights.read(file)
            model = single_file.build(library, class_name, self.config(component), state, component, file.name)
        else:
            model = self._from_folder(component, library, cls)
        if self.loras and component in COMPONENTS:
            fuse(model, component, self.loras, unet_config=self.config("unet"))
        if self.embeddings and component in TEXT_ENCODERS:
            add_vectors(model, component, self.embeddings, self.folder(tokenizer_of(component)))
        return completed(self, component, model).eval()

    def network_class(self, component: str) -> Any:
        """The class that model_index.json names for a network; raises a UserError for one that is not supported."""
        return network_class(component, *self.index[component])

    def _from_folder(self, component: str, library: str, cls: Any) -> nn.Module:
        folder = self.folder(component)
        files, variant = self._chosen_files(folder)
        for path in files:
            if path.suffix == weights.SAFETENSORS:
                weights.check_safetensors(path)
        options = {"torch_dtype" if library == "diffusers" else "dtype": torch.float32}
        options |= dict(local_files_only=True, output_loading_info=True, variant=variant)
        options |= {"trust_remote_code": False} if library == "transformers" else {}
        self.config(component)  # says what is absurd in it
        with without_code(folder) as clean:
            model, info = weights.readable(lambda: cls.from_pretrained(clean, **options), folder)
        # Both libraries fill what is missing with random numbers, and only log it.
        lost = sorted(info["missing_keys"])
        if lost:
            raise UserError(
                f"{folder}: {len(lost)} weights are missing, the first one is {lost[0]}",
                "the files may be damaged, or of another model; get them again",
            )
        note_left_out(folder, info["unexpected_keys"])
        return model

    def copy(self, component: str, to: Path) -> None:
        """Write a component (network, tokenizer or scheduler) as its own library would, whatever it is made of."""
        more = (COMPONENTS if self.loras else ()) + (TEXT_ENCODERS if self.embeddings else ())
        if component in (*self.files, *more):
            self.load(component).save_pretrained(to, safe_serialization=True)
        else:
            copy_folder(self.folder(component), to)
            if component.startswith("tokenizer") and self.embeddings:
                add_tokens(to, self.embeddings)

    def weight_files(self, component: str) -> list[Path]:
        own = [self.files[component]] if component in self.files else self._chosen_files(self.folder(component))[0]
        return own + [self.ip_adapter] * (component == "unet" and self.ip_adapter is not None)

    def _chosen_files(self, folder: Path) -> tuple[list[Path], str | None]:
        """Of the variant that was asked for, where this part has it; `open_source` has said where not."""
        variant = self.variant if self.variant in weights.variants(folder) else None
        return weights.chosen_files(folder, variant)

    def digest(self, components: list[str]) -> str:
        """sha256 over the weight files of the named components, LoRA files with their scales, and embeddings."""
        files: dict[str, Any] = {f"{name}/{p.name}": sha256(p) for name in components for p in self.weight_files(name)}
        return digest_of(files | self._added())

    def record(self) -> dict[str, Any]:
        """What a manifest keeps of where the parts came from, beside the name and the digest."""
        parts = {name: {"name": path.name, "sha256": sha256(path)} for name, path in self.files.items()}
        parts |= {name: {"name": path.name} for name, path in self.folders.items()}
        if self.ip_adapter is not None:
            parts["ip_adapter"] = {"name": self.ip_adapter.name, "sha256": sha256(self.ip_adapter)}
        return self._added() | ({"parts": parts} if parts else {}) | ({"variant": self.variant} if self.variant else {})

    def _added(self) -> dict[str, Any]:
        added = {"loras": self.loras, "embeddings": self.embeddings}
        return {name: [one.record() for one in several] for name, several in added.items() if several}

    @property
    def family(self) -> str:
        config = self.config("unet")
        if config.get("addition_embed_type") == "text_time":
            return "sdxl"
        return "sd2" if config.get("use_linear_projection") else "sd1"

    @property
    def refines(self) -> bool:
        """Whether it is an SDXL refiner, whose size conditioning ends in an aesthetic score."""
        return bool(self.index.get("requires_aesthetics_score"))

    @property
    def topology(self) -> str:
        known = identify(self.config("unet"))
        return known.name if known else "custom"


def open_source(
    model: str | Path,
    loras: Sequence[str | Path | LoraFile] = (),
    *,
    base: str | Path | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    adapter: str | Path | None = None,
    controlnet: str | Path | Sequence[str | Path] | None = None,
    ip_adapter: str | Path | None = None,
    image_encoder: str | Path | None = None,
    variant: str | None = None,
    few_step: str | None = None,
    safety_checker: bool = False,
    embeddings: Sequence[EmbeddingSpec] = (),
) -> Source:
    """Open a diffusers pipeline folder, fetch one from the hub, take the shipped one (`digits`), or a single file.

    Args:
        model: which one.
        loras: LoRA files to fuse into it, each as FILE or FILE=SCALE (`accel.models.lora`).
        base: for a single file: the pipeline folder or hub id whose tokenizers, scheduler and configs it uses.
        unet: file with the UNet's weights, in diffusers' names or the original code's, instead of the model's own.
        vae: folder or file of a VAE, full or tiny, instead of the model's own.
        adapter, controlnet: folder of a T2I-Adapter or a ControlNet that goes with it; or a list of up to three
            ControlNets, whose residuals are added.
        ip_adapter: file of an IP-Adapter that goes with it, as its authors publish it.
        image_encoder: folder of its image encoder; None for the pipeline's own `image_encoder`.
        variant: of the folder's weight files, such as "fp16".
        few_step: the few-step family that it is of, or "none", where its names do not say it (`accel.models.few_step`).
        safety_checker: whether the weights of its safety checker are fetched too, where it is a hub id.
        embeddings: files of textual inversion to add, each as FILE or FILE=TOKEN (`accel.models.embeddings`).

    Raises:
        UserError: for a path that does not exist, a folder that is not a pipeline, a model of another family, weights
            that do not fit, or a LoRA file or embedding that cannot be read or is for another model.
    """
    loras = tuple(lora_file(spec) for spec in loras)
    given, model = str(model), resolve(model)
    path, files = Path(model), {}
    if path.is_file():
        files = dict.fromkeys(_NETWORKS, path)
        path = _base_of(path, base)
    elif base is not None:
        raise UserError(f"--base {base} belongs to a single file, and {model} is not one", "leave --base out")
    else:
        path = _folder(model, variant, safety_checker)
    local = Path(model).stem if files else path.resolve().name
    if few_step is not None:
        families.check(few_step)
    name = printable(local if Path(given).exists() else given)
    index = _index(path)
    if files:  # diffusers' from_single_file, too, leaves out the checker of the folder beside
        index.pop("safety_checker", None)
    source = Source(path, name, index, loras, variant=variant, few_step=few_step)
    if unet is not None:
        files["unet"] = Path(unet)
    source = replace(source, files={name: file for name, file in files.items() if source.has(name)})
    if vae is not None:
        source = parts.with_vae(source, Path(resolve(vae)))
    if variant is not None:
        _check_variant(source, variant)
    nets = [controlnet] if isinstance(controlnet, (str, Path)) else list(controlnet or ())
    if adapter is not None and nets:
        raise UserError("an adapter and a ControlNet at once are not supported", "choose one of them")
    if adapter is not None:
        source = parts.with_part(source, "t2i_adapter", Path(adapter), ("T2IAdapter",))
    if nets:
        source = parts.with_controlnets(source, nets)
    source = with_ip_adapter(source, ip_adapter, image_encoder)
    if "unet" in source.files:
        single_file.refuse_others(weights.read(source.files["unet"]), source.files["unet"].name)
        source.config("unet")  # says now what does not fit
    if loras:
        check_components(loras, [name for name in COMPONENTS if source.has(name)], source.config("unet"))
    return replace(source, embeddings=learned(embeddings, source)) if embeddings else source


def _check_variant(source: Source, variant: str) -> None:
    """As in diffusers, a variant counts for the parts that have it, and is an error where none has."""
    names = [name for name in _NETWORKS if source.has(name) and name not in source.files]
    found = {name: weights.variants(source.folder(name)) for name in names}
    plain = [name for name in names if variant not in found[name]]
    if len(plain) == len(names):
        known = ", ".join(sorted({str(kind) for kinds in found.values() for kind in kinds if kind})) or "none"
        raise UserError(f"{source.path} has no variant {variant!r}", f"leave --variant out; its variants: {known}")
    if plain:
        parts = " and ".join(plain)
        warnings.warn(f"no variant {variant} of {parts} is there: plain weights are taken", Notice, stacklevel=4)


def _index(path: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline that has all parts which a Stable Diffusion needs."""
    file = path / "model_index.json"
    index = read_json(file, "model_index.json")
    if not isinstance(index, dict):
        raise UserError(f"{file} is not a JSON object", "save it with pipeline.save_pretrained(FOLDER)")
    names = [name for name, entry in index.items() if isinstance(entry, list)]
    if odd := [name for name in names if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name)]:
        raise UserError(f"{file}: {odd[0]!r:.80} cannot be the name of a part", "get the file again")
    index, removed = stripped(index)
    if removed:
        note(file, removed)
    index = parts.each_controlnet(index, path)
    if index.get("_class_name") == EDM:
        fix = f"accel run {path} --class 0 draws with it, accel export {path} OUT makes a bundle of it"
        raise UserError(f"{path} is an EDM model, which draws images of classes and not of texts", fix)
    pipeline = Source(path, path.name, index)
    for needed in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not pipeline.has(needed) and not pipeline.has(f"{needed}_2"):  # SDXL's refiner has the second ones alone
            kind = index.get("_class_name")
            other = re.search(r"StableDiffusion3|Flux|Transformer|PixArt|Sana", str(kind))
            fix = single_file.ELSEWHERE if other else SUPPORTED
            raise UserError(f"{path} is a {kind} without {needed}", fix)
    return index


def _folder(model: str | Path, variant: str | None, safety_checker: bool = False) -> Path:
    """The pipeline folder of a path or hub id."""
    path = Path(model)
    settle(path)
    if not path.exists():
        if not is_hub_id(model):
            raise UserError(f"no such folder: {model}", "give a diffusers pipeline folder or a hub id such as org/name")
        path = hub.download(str(model), variant, safety_checker=safety_checker)
    if (path / "accel.json").is_file():
        raise UserError(f"{path} is a bundle already", f"accel run {path} --prompt ...")
    if not (path / "model_index.json").is_file():
        raise UserError(
            f"{path} is not a diffusers pipeline: it has no model_index.json",
            "save one with pipeline.save_pretrained(FOLDER)",
        )
    return path


def _base_of(file: Path, base: str | Path | None) -> Path:
    """The folder with what a single file lacks, of the same family."""
    state = weights.read(file)
    family = single_file.family(state, file.name)
    if base is None:
        repo = single_file.BASES[family]
        try:
            return hub.download(repo, None, configs_only=True)
        except UserError:
            raise UserError(
                f"{file} has no tokenizer, scheduler and configs, and {repo} cannot be fetched",
                "--base FOLDER: a diffusers pipeline of the same family",
            ) from None
    folder = _folder(resolve(base), None)
    own = Source(folder, folder.name, read_json(folder / "model_index.json", "model_index.json")).family
    if own != family:
        raise UserError(f"{file} is of family {family}, and {folder} of {own}", "--base FOLDER of the same family")
    return folder
