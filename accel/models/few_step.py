"""Few-step models by name: each family is sampled in one way only, and another way gives another image in silence.

A family is known by the published name of a weight file, a LoRA, a folder or a hub id; LCM and SDXL-Turbo also by their
scheduler. To add one: a row of `FAMILIES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, unknown
from ..sampling.noise_schedule import NoiseSchedule, training_betas
from ..sampling.samplers import SAMPLERS, dmd2_timesteps


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one kind of few-step model is sampled.

    Attributes:
        name: what `--few-step` calls it.
        published: its files and folders, in words.
        pattern: regular expression for their names; a group `steps` is the number of steps.
        sampler: a key of `SAMPLERS`; None for the scheduler that the folder carries.
        steps: number of steps where the name does not say it.
        guidance: guidance scale; None for the pipeline's usual one, where the UNet takes the scale as an input.
        options: of the sampler, as `accel.sampling.samplers.table` takes them.
        fields: of the scheduler config that the files ask for.
        timesteps: the grid itself, where it is not the sampler's own.
        marks: fields of a scheduler config (and its `_class_name`) that no other model has.
        source: who says so.
    """

    name: str
    published: str
    pattern: str
    sampler: str | None
    steps: int
    guidance: float | None = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    timesteps: tuple[float, ...] | None = None
    marks: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def constants(self, steps: int | None, guidance: float) -> dict[str, Any]:
        """Sampling constants for `accel.sampling.Sampling.from_dict`; `guidance` where the family has none."""
        steps = steps or self.steps
        if self.sampler == "dmd2":
            grid: dict[str, Any] = {"timesteps": dmd2_timesteps(steps)}
        else:
            grid = {"steps": steps} if self.timesteps is None else {"timesteps": list(self.timesteps)}
        scale = guidance if self.guidance is None else self.guidance
        made = {"name": self.sampler, **grid, "guidance": scale}
        return made | ({"options": dict(self.options)} if self.options else {})


_TRAILING = {"timestep_spacing": "trailing"}
# In the order in which they are tried.
FAMILIES: tuple[Family, ...] = (
    Family(
        name="dmd2",
        published="`dmd2_sdxl_{1,4}step_unet*`, `dmd2_sdxl_4step_lora*`",
        pattern=r"dmd2.*?(?P<steps>[1248])-?step",
        sampler="dmd2",
        steps=4,
        source="tianweiy/DMD2",
    ),
    Family(
        name="sdxl-lightning-x0",
        published="`sdxl_lightning_1step_unet_x0`, `sdxl_lightning_1step_x0`",
        pattern=r"sdxl[-_]lightning[-_]1step(_unet)?_x0",
        sampler="euler",
        steps=1,
        options=_TRAILING,
        fields={"prediction_type": "sample"},
        source="ByteDance/SDXL-Lightning",
    ),
    Family(
        name="sdxl-lightning",
        published="`sdxl_lightning_{2,4,8}step_unet`, `..._lora`, and the full checkpoints",
        pattern=r"sdxl[-_]lightning[-_](?P<steps>[248])step",
        sampler="euler",
        steps=4,
        options=_TRAILING,
        source="ByteDance/SDXL-Lightning",
    ),
    Family(
        name="hyper-sdxl-unet",
        published="`Hyper-SDXL-1step-Unet`, `Hyper-SDXL-1step-Unet-Comfyui`",
        pattern=r"hyper-sdxl-1step-unet",
        sampler="lcm",
        steps=1,
        timesteps=(800,),
        source="ByteDance/Hyper-SD",
    ),
    Family(
        name="hyper-sd-1step",
        published="`Hyper-SD15-1step-lora`, `Hyper-SDXL-1step-lora`",
        pattern=r"hyper-sd(15|xl)-1steps?-lora",
        sampler="tcd",
        steps=1,
        options={"eta": 1.0},
        source="ByteDance/Hyper-SD",
    ),
    Family(
        name="hyper-sd-cfg",
        published="`Hyper-SD15-{8,12}steps-CFG-lora`, `Hyper-SDXL-{8,12}steps-CFG-lora`",
        pattern=r"hyper-sd(15|xl)-(?P<steps>8|12)steps?-cfg-lora",
        sampler="ddim",
        steps=8,
        guidance=5.0,
        options=_TRAILING,
        source="ByteDance/Hyper-SD",
    ),
    Family(
        name="hyper-sd",
        published="`Hyper-SD15-{2,4,8}steps-lora`, `Hyper-SDXL-{2,4,8}steps-lora`",
        pattern=r"hyper-sd(15|xl)-(?P<steps>[248])steps?-lora",
        sampler="ddim",
        steps=4,
        options=_TRAILING,
        source="ByteDance/Hyper-SD",
    ),
    Family(
        name="pcm-lcm",
        published="`pcm_sd15_lcmlike_lora_converted`, `pcm_sdxl_lcmlike_lora_converted`",
        pattern=r"pcm_(sd15|sdxl)_lcmlike",
        sampler="lcm",
        steps=4,
        source="wangfuyun/PCM_Weights",
    ),
    Family(
        name="pcm-cfg",
        published="`pcm_{sd15,sdxl}_normalcfg_{4,8,16}step_converted`",
        pattern=r"pcm_(sd15|sdxl)_normalcfg_(?P<steps>4|8|16)step",
        sampler="tcd",
        steps=4,
        guidance=7.5,
        source="wangfuyun/PCM_Weights",
    ),
    Family(
        name="pcm",
        published="`pcm_{sd15,sdxl}_smallcfg_{2,4,8,16}step_converted`",
        pattern=r"pcm_(sd15|sdxl)_smallcfg_(?P<steps>2|4|8|16)step",
        sampler="tcd",
        steps=4,
        source="wangfuyun/PCM_Weights",
    ),
    Family(
        name="tcd",
        published="`TCD-SD15-LoRA`, `TCD-SD21-base-LoRA`, `TCD-SDXL-LoRA`",
        pattern=r"tcd-sd(15|21-base|xl)-lora",
        sampler="tcd",
        steps=4,
        options={"eta": 0.3},
        source="h1t/TCD-SDXL-LoRA",
    ),
    Family(
        name="sdxl-turbo",
        published="`stabilityai/sdxl-turbo`, `sd_xl_turbo_1.0*`",
        pattern=r"sd_?xl[-_]turbo",
        sampler="euler_ancestral",
        steps=1,
        options=_TRAILING,
        marks={"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
        source="stabilityai/sdxl-turbo",
    ),
    Family(
        name="sd-turbo",
        published="`stabilityai/sd-turbo`, `sd_turbo*`",
        pattern=r"(^|[^a-z])sd[-_]turbo",
        sampler="euler",
        steps=1,
        options=_TRAILING,
        source="stabilityai/sd-turbo",
    ),
    Family(
        name="sdxs",
        published="`IDKiro/sdxs-512-*`",
        pattern=r"(^|[^a-z])sdxs([^a-z]|$)",
        sampler=None,
        steps=1,
        source="IDKiro/sdxs-512-0.9",
    ),
    Family(
        name="lcm",
        published="`lcm-lora-*`, `LCM_*`, `lcm-sdxl`, and every folder with an LCMScheduler",
        pattern=r"(^|[^a-z])lcm[-_]?(lora|dreamshaper|sd|ssd|sota)",
        sampler="lcm",
        steps=4,
        guidance=None,
        marks={"_class_name": "LCMScheduler"},
        source="latent-consistency",
    ),
)
_BY_NAME = {family.name: family for family in FAMILIES}
# What the name of a few-step model usually has in it.
_TELLING = re.compile(
    r"turbo|lightning|hyper-?sd|sdxs|(?<![a-z])(lcm|tcd|pcm|dmd2?)(?![a-z])|(?<!\d)\d{1,2}[-_ ]?steps?(?![a-z])", re.I
)
# File names that say nothing: their folder is asked.
_GENERIC = re.compile(r"^(pytorch_lora_weights|diffusion_pytorch_model|model)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """A family, the number of steps that the name says, and the name."""

    family: Family
    steps: int | None
    by: str


def names() -> list[str]:
    """What `--few-step` takes."""
    return [*_BY_NAME, "none"]


def check(name: str) -> None:
    if name not in names():
        raise unknown("few-step family", name, names())


def recognise(forced: str | None, paths: Iterable[Path], name: str, config: Mapping[str, Any]) -> Found | None:
    """The family of a model, or None.

    Args:
        forced: what `--few-step` said.
        paths: its files that are not the folder's own: UNet, single checkpoint, LoRA.
        name: of the folder, or the hub id.
        config: its scheduler config, with the class that model_index.json names.
    """
    if forced is not None:
        check(forced)
        if forced == "none":
            return None
        return Found(_BY_NAME[forced], _steps_of([*map(telling, paths), name]), "--few-step")
    for text in (*map(telling, paths), name):
        for family in FAMILIES:
            if match := re.search(family.pattern, text, re.IGNORECASE):
                steps = match.groupdict().get("steps")
                return Found(family, int(steps) if steps else None, text)
    for family in FAMILIES:
        if family.marks and all(config.get(key) == value for key, value in family.marks.items()):
            return Found(family, None, f"its {config['_class_name']}")
    return None


def ask_about(paths: Iterable[Path], name: str, config: Mapping[str, Any]) -> None:
    """Refuse to guess where a name looks like a few-step model of no family here.

    Raises:
        UserError: with the question.
    """
    if config.get("_class_name") == "TCDScheduler":
        return
    for text in (*map(telling, paths), name):
        if _TELLING.search(text):
            raise UserError(
                f"{text} looks like a few-step model, and each kind of them is sampled in a way of its own",
                f"--few-step NAME: one of {', '.join(_BY_NAME)}; or --few-step none for a model of many steps",
            )


def telling(path: Path) -> str:
    """The name of a file, or of its folder where the file's says nothing."""
    return path.parent.name if _GENERIC.search(path.name) else path.name


def scheduler_of(config: Mapping[str, Any], constants: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scheduler config with which diffusers draws what few-step sampling constants say; None for other samplers.

    DMD2's is LCMScheduler: with `original_inference_steps` = T its grid of n steps is T - 1 downwards by T / n, and its
    boundary scaling is 1 to seven digits. One step in the middle of the schedule is the last one of a shorter schedule.
    An LCM that was trained here says its own fields of LCMScheduler.
    """
    name, spacing = str(constants["name"]), constants.get("options", {}).get("timestep_spacing")
    if name not in ("dmd2", "lcm", "tcd") and spacing is None:
        return None
    entry = SAMPLERS[name]
    made = {key: value for key, value in config.items() if key in entry.fields}
    made |= {"_class_name": entry.scheduler, **entry.pinned}
    if spacing is not None:
        made["timestep_spacing"] = spacing
    made |= {field: constants[field] for field in entry.fields if name == "lcm" and field in constants}
    if name == "dmd2":
        length = NoiseSchedule.from_scheduler(config).T
        grid = [int(t) for t in constants.get("timesteps") or ()]
        if len(grid) == 1 and grid[0] + 1 < length:
            length = grid[0] + 1
            made |= {"trained_betas": training_betas(config)[:length], "num_train_timesteps": length}
        made["original_inference_steps"] = length
    return None if made.items() <= dict(config).items() else made


def _steps_of(texts: Iterable[str]) -> int | None:
    found = [int(match[1]) for text in texts if (match := re.search(r"(?<!\d)(\d{1,2})[-_]?step", text, re.IGNORECASE))]
    return found[0] if found else None
