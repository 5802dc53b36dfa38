"""A model under the names that diffusers' pipelines have: from_pretrained, save_pretrained, push_to_hub."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..bundle.manifest import MANIFEST
from ..engines.select import facts
from ..errors import Notice, UserError
from ..files import new_folder, write_json
from ..pipeline import Pipeline
from ..publishing import Pushed, push
from ..sampling.noise_schedule import NoiseSchedule
from ..sampling.samplers import own_sampler
from .loader import load

# Arguments of diffusers' from_pretrained that ask for what is so anyway.
_GRANTED = ("use_safetensors", "low_cpu_mem_usage", "requires_safety_checker", "image_encoder", "feature_extractor")
_HELD = "an engine holds its network; accel.load(..., low_memory=True) loads each when its phase begins"


class AccelPipeline(Pipeline):
    """`accel.Pipeline` for programs that were written for diffusers:

        pipe = AccelPipeline.from_pretrained("my-bundle", engine="auto").to("cpu")
        image = pipe("a fox in the snow", num_inference_steps=4, guidance_scale=0.0).images[0]

    A call takes diffusers' arguments or ours, as every pipeline does. What diffusers' pipelines do to save memory is
    noted and does nothing here.
    """

    _quiet = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | Bundle,
        engine: str | Mapping[str, str] = "auto",
        *,
        torch_dtype: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> AccelPipeline:
        """Load a bundle, a diffusers pipeline, or the hub id of either.

        Args:
            pretrained_model_name_or_path: as `accel.load` takes it.
            engine: a name, "auto", or one per component.
            torch_dtype, dtype: for the engines that run torch; others compute in what the bundle was exported in, which
                a note says where it is another one.
            options: of `accel.load` (`revision`, `loras`, `low_memory`, `device`, ...).

        Raises:
            UserError: as `accel.load`.
        """
        options = {name: value for name, value in options.items() if name not in _GRANTED}
        wanted = str(torch_dtype if torch_dtype is not None else dtype or "").removeprefix("torch.")
        names = set(engine.values()) if isinstance(engine, Mapping) else {engine}
        if wanted and "auto" not in names and not any(facts(name).reads_graph for name in names):
            options["dtype"] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(wanted, wanted)
        made = cls.__new__(cls)
        made.__dict__.update(vars(load(pretrained_model_name_or_path, engine, **options)))
        own = made.dtype
        if wanted and "dtype" not in options and wanted != own:
            text = f"the bundle computes in {own}, whatever torch_dtype says; accel export --precision chooses it"
            warnings.warn(Notice(text), stacklevel=2)
        return made

    def __call__(self, *args: Any, **call: Any) -> Any:
        """As `accel.Pipeline`, with a progress bar, as in diffusers, unless `set_progress_bar_config` disabled it."""
        return super().__call__(*args, **{"progress": not self._quiet, **call})

    @property
    def dtype(self) -> str:
        """What the UNet's tensors are: float32, float16, bfloat16."""
        return self.bundle.component("unet").dtype

    def to(self, *args: Any, **kwargs: Any) -> AccelPipeline:
        """The pipeline itself. It stays where its engines were loaded, which a note says where that is elsewhere."""
        try:
            super().to(*args, **kwargs)
        except UserError as error:
            if self.closed:
                raise
            warnings.warn(Notice(f"{error.message}; {error.fix}"), stacklevel=2)
        return self

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **push: Any
    ) -> None:
        """Write the bundle into a folder, with every file compared with its digest.

        Args:
            save_directory: folder that does not exist yet.
            push_to_hub: push it too; `push` as `push_to_hub` takes it.
            repo_id: `user/name`; by default the folder's name, which needs a user before it.

        Raises:
            UserError: for a folder that is there, or a pipeline that was never compiled.
        """
        bundle = self._bundle()
        bundle.verify()
        with new_folder(Path(save_directory)) as folder:
            bundle.copy(folder)
            write_json(folder / MANIFEST, bundle.manifest.as_dict())
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, **push)

    def push_to_hub(self, repo_id: str, **options: Any) -> Pushed:
        """Put the bundle into a repository of the hub; `options` as `accel.push` takes them (licence, private, ...)."""
        return push(self._bundle(), repo_id, **options)

    def _bundle(self) -> Bundle:
        if hasattr(self.bundle, "source"):
            fix = "accel export MODEL BUNDLE makes a bundle of it; diffusers saves the pipeline"
            raise UserError(f"{self.bundle.name} is a diffusers pipeline and no bundle", fix)
        return self.bundle

    @property
    def scheduler(self) -> Any:
        """The scheduler of diffusers that the model is sampled with; another one may be set, as in diffusers."""
        import diffusers

        config = dict(self.schedule.config)
        return getattr(diffusers, str(config["_class_name"])).from_config(config)

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        if (name := own_sampler(config)) is None:
            fix = "accel list samplers says which there are"
            raise UserError(f"there is no sampler that equals {type(scheduler).__name__}", fix)
        old = self.bundle.manifest.sampler
        steps = old.get("steps") or len(old["timesteps"])
        sampler = {"name": name, "steps": steps, "guidance": old["guidance"]}
        self.schedule = NoiseSchedule.from_scheduler(config)
        self.bundle = replace(self.bundle, manifest=replace(self.bundle.manifest, sampler=sampler))

    def load_lora_weights(self, path: str | Path, weight_name: str | None = None, **_: Any) -> None:
        """Run with a LoRA file too, fused into the weights in memory."""
        self.set_loras([*self.loras, Path(path) / weight_name if weight_name else path])

    def unload_lora_weights(self) -> None:
        """Run without LoRA files again."""
        self.set_loras(())

    def set_progress_bar_config(self, **config: Any) -> None:
        """`disable=True` lets calls show no progress."""
        self._quiet = bool(config.get("disable", self._quiet))

    def _noted(self, *_: Any, **__: Any) -> None:
        warnings.warn(Notice(_HELD), stacklevel=2)

    enable_model_cpu_offload = enable_sequential_cpu_offload = enable_attention_slicing = _noted
    enable_xformers_memory_efficient_attention = enable_vae_slicing = _noted
