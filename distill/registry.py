"""The table of training methods: what `accel distill` offers, and which code runs it.

To add a method: one file with its settings (a `Recipe`) and its `training.method.Method`, and one entry here. Code is
named as "module:name", relative to this package, and imported when it is used: this file needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from accel.errors import unknown

from .settings import Recipe


def load(reference: str) -> Any:
    """What a "module:name" stands for."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module, __package__), name)


@dataclass(frozen=True)
class MethodEntry:
    """A training method, as one sub-verb of `accel distill`.

    Attributes:
        recipe: "module:name" of what makes the default settings, called without arguments; the class of the settings
            identifies the method.
        help: one line for the command line.
        factory: of (recipe, encoders) -> `training.method.Method`.
        presets: names of functions in `recipes` that `--recipe` takes besides the defaults, separated by spaces.
        encoders: of (model, device=..., dtype=...) -> what turns images and captions into what the model learns from.
        batches: of (recipe, encoders, run, accelerator, say, turns) -> (first step) -> micro-batches of this process.
        complete: of (recipe, encoders) -> the recipe with the fields filled in that depend on others; "" for none.
        memory_estimate: of (recipe, encoders, shards=...) -> `few_step.memory.MemoryEstimate`; "" for none.
    """

    recipe: str
    help: str
    factory: str
    presets: str = ""
    encoders: str = ".edm.source:open_text_encoders"
    batches: str = ".data.batches:batches_of"
    complete: str = ""
    memory_estimate: str = ""

    def settings(self) -> Recipe:
        """The default settings."""
        return load(self.recipe)()


KD = ".methods.kd:Distillation"

METHODS = {
    "base": MethodEntry(
        ".recipes:base",
        "SD1.x or SD2.x without one layer of each stage (BK-SDM-Base, Segmind's SD-Small)",
        KD,
        "sd15_base segmind_small digits_base",
    ),
    "small": MethodEntry(".recipes:small", "base without the mid block (BK-SDM-Small)", KD, "sd15_small digits_small"),
    "tiny": MethodEntry(
        ".recipes:tiny",
        "small without the fourth stage (BK-SDM-Tiny, Segmind's SD-Tiny)",
        KD,
        "sd15_tiny segmind_tiny digits_tiny",
    ),
    "ssd-1b": MethodEntry(".recipes:ssd_1b", "SDXL with SSD-1B's transformer depths", KD),
    "vega": MethodEntry(".recipes:vega", "SDXL with Segmind-Vega's transformer depths", KD),
    "dmd2": MethodEntry(
        ".settings:DMD2Recipe",
        "a few-step student, by distribution matching and a discriminator (DMD2)",
        ".few_step.dmd2:DMD2",
        presets="dmd2_sd15 dmd2_sdxl dmd2_sdxl_lora dmd2_sdxl_1step dmd2_imagenet64 digits_dmd2 digits_dmd2_1step",
        encoders=".edm.source:open_encoders",
        memory_estimate=".few_step.memory:predict",
    ),
    "lcm": MethodEntry(
        ".settings:LCMRecipe",
        "a few-step student, or a LoRA that makes one, by consistency distillation (LCM, LCM-LoRA)",
        ".few_step.lcm:LCM",
        presets="lcm_sd15 lcm_lora_sd15 lcm_lora_sdxl digits_lcm digits_lcm_lora",
        complete=".few_step.lcm:completed",
        memory_estimate=".few_step.memory:predict",
    ),
    "regress": MethodEntry(
        ".settings:RegressionRecipe",
        "warm up a one-step student on the teacher's own images",
        ".few_step.regression:Regression",
        batches=".few_step.regression:batches_of",
    ),
    "finetune": MethodEntry(
        ".settings:FinetuneRecipe",
        "fine-tune the UNet of any pipeline",
        ".methods.kd:Denoising",
        presets="segmind_portrait",
    ),
    "lora": MethodEntry(
        ".settings:LoraRecipe",
        "train a LoRA of any pipeline: a small file of low-rank updates",
        ".methods.lora:LowRank",
        presets="digits_lora",
    ),
    "dreambooth": MethodEntry(
        ".settings:DreamBoothRecipe",
        "teach any pipeline a subject from a few images",
        ".methods.dreambooth:method",
        batches=".methods.dreambooth:batches_of",
        complete=".methods.dreambooth:completed",
    ),
    "vae": MethodEntry(
        ".settings:TinyVaeRecipe",
        "a tiny VAE that replaces a pipeline's own, which takes most of the time of a few-step image",
        ".methods.tiny_vae:TinyVaeMethod",
        presets="digits_vae",
    ),
}


def entry_of(recipe: Recipe) -> MethodEntry:
    """The method that a recipe is settings of."""
    return next(entry for entry in METHODS.values() if type(entry.settings()) is type(recipe))


def recipe_names(verb: str | None = None) -> list[str]:
    """The names that `recipe` takes: of one method's recipes, or of all."""
    return list(_references(verb))


def settled(verb: str, digits: bool = False) -> list[str]:
    """The recipes, by name, that a method's defaults do not stand for: those of published models, or of digits."""
    return [name for name in METHODS[verb].presets.split() if name.startswith("digits") == digits]


def recipe(name: str, verb: str | None = None) -> Recipe:
    """A recipe by name (`-` and `_` are the same), of one method or of any.

    Raises:
        UserError: for an unknown name; the known ones are listed.
    """
    known = _references(verb)
    reference = known.get(name.replace("-", "_"))
    if reference is None:
        raise unknown("recipe", name, known, verb or "")
    return load(reference)()


def _references(verb: str | None) -> dict[str, str]:
    """Name -> what makes the recipe, as "module:name"."""
    return {
        own.replace("-", "_"): reference
        for method, entry in METHODS.items()
        if verb in (None, method)
        for own, reference in (
            (method, entry.recipe),
            *((preset, f".recipes:{preset}") for preset in entry.presets.split()),
        )
    }
