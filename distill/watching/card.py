"""The card of a result, README.md: what it was trained from and on, settings, figures, samples, how it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.assets import hub_id, knows_only_digits, public_name
from accel.errors import markdown
from accel.files import write_bytes
from accel.models.lora import WEIGHT_NAME

from ..settings import Recipe
from ..sources.mixture import parts_of
from ..sources.prompts import TEACHER

SAMPLES = "samples.png"
_WINDOW = 50  # steps whose losses are averaged
_MODELS = ("model", "teacher", "data_model")
_UNSAID = {*_MODELS, "data", "class_data", "cache", "pairs", "log", "sample_prompts", "workers", "keep"}


def write(folder: Path, record: Mapping[str, Any], recipe: Recipe, run: Path, *, sdxl: bool = False) -> None:
    """Write the card of a result, and the last sample grid of its run beside it.

    Args:
        folder: the result: a pipeline, a LoRA or a VAE, complete.
        record: its training.json.
        run: where losses.jsonl and the samples are.
        sdxl: the model is of SDXL's family.
    """
    grids = sorted((run / "samples").glob("step-*.png"), key=lambda path: int(path.stem.removeprefix("step-")))
    if grids:
        write_bytes(folder / SAMPLES, grids[-1].read_bytes())
    losses = run / "losses.jsonl"
    lines = losses.read_text(errors="replace").splitlines() if losses.is_file() else []
    text = card(folder, record, recipe, lines, sdxl=sdxl, samples=bool(grids))
    (folder / "README.md").write_text(text)


def card(
    folder: Path, record: Mapping[str, Any], recipe: Recipe, lines: Sequence[str], *, sdxl: bool, samples: bool
) -> str:
    """The text; arguments as `write`, and the lines of losses.jsonl."""
    kind = _kind(folder)
    sections = [
        _head(recipe, kind, sdxl),
        f"# {markdown(_title(folder, recipe, kind))}",
        f"Trained by accel ({recipe.method}) from {_linked(recipe.model)}"
        + (f"; the teacher is {_linked(recipe.teacher)}" if getattr(recipe, "teacher", "") else "")
        + ". `training.json` has every setting.",
        *([f"![Samples of the last step]({SAMPLES})", *_prompts(recipe)] if samples else []),
        "## Use it",
        _use(folder, recipe, kind, sdxl),
        "## Data",
        "\n".join(_data(record, recipe)),
        "## Settings",
        _table(("setting", "value"), list(_settings(recipe))),
        "## Figures",
        _table(("figure", "value"), list(_figures(record, lines))),
    ]
    return "\n\n".join(sections) + "\n"


def _kind(folder: Path) -> str:
    """ "pipeline", "lora", "vae", or "edm" for a pipeline that diffusers does not know."""
    if (folder / WEIGHT_NAME).is_file():
        return "lora"
    index = folder / "model_index.json"
    if not index.is_file():
        return "vae"
    return "pipeline" if json.loads(index.read_text())["_class_name"].startswith("StableDiffusion") else "edm"


def _title(folder: Path, recipe: Recipe, kind: str) -> str:
    words = {"lora": "LoRA of ", "vae": "Tiny VAE of "}.get(kind, "")
    few = _sampler(folder)
    if not words:
        words = f"{_steps(few)}-step student of " if _steps(few) else f"{recipe.method} of "
    return words + public_name(recipe.model)


def _head(recipe: Recipe, kind: str, sdxl: bool) -> str:
    fields: dict[str, Any] = {"license": "apache-2.0"} if knows_only_digits(recipe.model) else {}
    fields["library_name"] = "diffusers"
    if kind != "vae":
        fields["pipeline_tag"] = "text-to-image"
    if base := hub_id(recipe.model):
        fields |= {"base_model": base[0], "base_model_relation": "adapter" if kind == "lora" else "finetune"}
    data = [spec for spec, _ in parts_of(recipe.data) if hub_id(spec)]
    if data:
        fields["datasets"] = data
    family = "edm" if kind == "edm" else f"stable-diffusion{'-xl' if sdxl else ''}"
    fields["tags"] = ["accel", *(["lora"] if kind == "lora" else []), "text-to-image", family, recipe.method.lower()]
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---"])


def _linked(name: str) -> str:
    found = hub_id(name)
    return markdown(public_name(name)) if found is None else f"[{found[0]}](https://huggingface.co/{found[0]})"


def _prompts(recipe: Recipe) -> Iterator[str]:
    prompts = [text.strip() for text in recipe.sample_prompts.split("|") if text.strip()]
    if prompts:
        yield f"Prompts: {'; '.join(map(markdown, prompts))}."


def _sampler(folder: Path) -> dict[str, Any]:
    path = folder / "sampler.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _steps(sampler: Mapping[str, Any]) -> int:
    """Of a few-step model; 0 for any other."""
    return len(sampler.get("timesteps") or ()) or (sampler["steps"] if sampler.get("name") == "lcm" else 0)


def _use(folder: Path, recipe: Recipe, kind: str, sdxl: bool) -> str:
    pipeline = "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline"
    first = getattr(recipe, "instance_prompt", "") or recipe.sample_prompts.split("|")[0].strip() or "..."
    prompt = first.replace("`" * 3, "'" * 3)
    base = public_name(recipe.model).replace("`", "'")
    steps, timesteps = _steps(_sampler(folder)), _sampler(folder).get("timesteps")
    how = f", num_inference_steps={steps}, guidance_scale=0.0" if steps else ""
    few = "from diffusers import LCMScheduler\n" if steps and kind == "lora" else ""
    set_few = "pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)\n" if few else ""
    if few and timesteps:
        how = f", timesteps={timesteps}, guidance_scale=0.0"
    if kind == "edm":
        return "`accel distill dmd2 --model .` goes on from this folder, which holds one UNet and its constants."
    if kind == "vae":
        code = f"""from diffusers import AutoencoderTiny, {pipeline}

pipe = {pipeline}.from_pretrained({base!r})
pipe.vae = AutoencoderTiny.from_pretrained(".")  # this folder
pipe({prompt!r})"""
        option = f"{base} BUNDLE --vae ."
    elif kind == "lora":
        code = f"""from diffusers import {pipeline}
{few}
pipe = {pipeline}.from_pretrained({base!r})
{set_few}pipe.load_lora_weights(".")  # this folder
pipe({prompt!r}{how})"""
        option = f"{base} BUNDLE --lora ."
    else:
        code = f"""from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained(".")  # this folder
pipe({prompt!r}{how})"""
        option = ". BUNDLE"
    text = f"```python\n{code}\n```\n\nCompiled: `accel export {option}`."
    rank, alpha = getattr(recipe, "rank", 0), getattr(recipe, "alpha", 0.0)
    if kind == "lora" and alpha and alpha != rank:
        text += (
            "\n\nAlpha differs from the rank and stands in the file's metadata (`lora_adapter_metadata`), which "
            "diffusers reads. A program that does not would apply it at another strength: scale it there by alpha / "
            "rank."
        )
    return text


def _data(record: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    parts = parts_of(recipe.data)
    for spec, share in parts:
        drawn = spec.startswith(TEACHER)
        name = markdown(public_name(spec.removeprefix(TEACHER)))
        by = _linked(recipe.data_model or getattr(recipe, "teacher", "") or recipe.model)
        said = f"images that {by} drew of the prompts in {name}" if drawn else _linked(spec)
        yield f"* {said}" + (f", {float(share):.1%} of the examples" if len(parts) > 1 else "") + "."
    if record.get("training_images"):
        yield f"* {record['training_images']:,} of them were trained on" + (
            f", {recipe.validation:,} held out." if recipe.validation else "."
        )
    if recipe.score_column:
        yield f"* Only those with {markdown(recipe.score_column)} of at least {recipe.min_score:g}."
    if recipe.min_size:
        yield f"* Only those of at least {recipe.min_size} px in width and height."
    if recipe.buckets:
        yield f"* In aspect-ratio buckets of steps of {recipe.bucket_step} px around {recipe.resolution} px."


def _settings(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The settings that differ from the method's defaults, and those that everybody asks for."""
    always = {"resolution", "steps", "batch", "accumulation", "learning_rate", "mixed_precision", "seed"}
    for name, field in recipe.__dataclass_fields__.items():
        value = getattr(recipe, name)
        if name not in _UNSAID and (name in always or value != field.default):
            yield name.replace("_", " "), f"{value}"


def _figures(record: Mapping[str, Any], lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    yield "steps", f"{record['steps']:,}"
    yield "images seen", f"{record['images']:,}"
    yield "seconds per step", f"{record['seconds_per_step']:g} on {record['processes']} x {record['device']}"
    known: dict[str, list[float]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut in half
        for name, value in entry.items():
            if isinstance(value, int | float) and math.isfinite(value):
                known.setdefault(name, []).append(value)
    for name, values in known.items():
        if name in ("step", "seconds") or name.rpartition("/")[2] in ("lr", "grad_norm"):
            continue
        if name.startswith("validation/"):
            yield f"{name}, at the end", f"{values[-1]:.4g}"
        else:
            last = values[-_WINDOW:]
            yield f"{name}, mean of the last {len(last)}", f"{sum(last) / len(last):.4g}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[markdown(str(cell)) for cell in line] for line in (columns, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], ["---"] * len(columns), *cells[1:]))
