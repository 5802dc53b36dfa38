"""Copy tokenizers, scheduler and model_index.json into a bundle: all that an app needs beside the networks."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from accel.bundle.kinds import KINDS
from accel.files import read_json, write_json
from accel.models.config_files import clip_tokenizer
from accel.models.source import Source
from accel.sampling import Sampling


def copy_pipeline_files(source: Source, folder: Path, sampling: Sampling) -> None:
    """Copy them from the source, tokenizers with its learned tokens and in both of the forms that other libraries read.

    The scheduler of a few-step model becomes the one with which diffusers draws the same (`Source.scheduler_for`).
    """
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        if source.has(name):
            source.copy(name, folder / name)
            if name != "scheduler":
                complete_tokenizer(folder / name)
    config = source.scheduler_for(sampling.as_dict())
    if config != source.config("scheduler"):
        # JSON has no word for -infinity, which is a default.
        finite = {key: value for key, value in config.items() if value != -math.inf}
        write_json(folder / "scheduler" / "scheduler_config.json", finite)
    # The classes of parts that lie elsewhere, and of the scheduler; without fields that lead to code.
    index = dict(source.index) | {"scheduler": ["diffusers", config["_class_name"]]}
    kept = source.path / "model_index.json"
    if source.folders or index != read_json(kept, "model_index.json"):
        others = [name for name, kind in KINDS.items() if kind.adds]  # optimum has no place for them
        write_json(folder / "model_index.json", {k: v for k, v in index.items() if k not in others})
    else:
        shutil.copyfile(kept, folder / "model_index.json")


def complete_tokenizer(folder: Path) -> None:
    """Make sure that a CLIP tokenizer folder holds `tokenizer.json` and also `vocab.json` with `merges.txt`.

    transformers 5 writes only the first, transformers 4 (and with it optimum) reads only the others, and the published
    Stable Diffusion folders have only the others; apps without transformers want the first.
    """
    if not (folder / "tokenizer.json").exists():
        clip_tokenizer(folder, fast=True).backend_tokenizer.save(str(folder / "tokenizer.json"))
    if not (folder / "vocab.json").exists():
        model = read_json(folder / "tokenizer.json", "tokenizer.json")["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
