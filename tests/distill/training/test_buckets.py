"""SDXL trains on buckets of two data sets, and a run that was interrupted ends with the same weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from accel.distill import settings
from accel.distill.methods.kd import Denoising
from accel.distill.run import execute

UNET = Path("unet/diffusion_pytorch_model.safetensors")


def write_folder(folder, sizes):
    folder.mkdir()
    lines = []
    for row, size in enumerate(sizes):
        values = np.random.default_rng(row).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(values).save(folder / f"{row}.png")
        lines.append(json.dumps({"file_name": f"{row}.png", "text": "the cat", "score": row}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_buckets_train_and_resume_to_the_same_weights(sdxl, tmp_path, monkeypatch):
    photos = write_folder(tmp_path / "photos", [(96, 96), (150, 80), (80, 150)] * 3)
    art = write_folder(tmp_path / "art", [(64, 64), (160, 96)] * 3)
    shapes, loss = [], Denoising.loss

    def seen(self, phase, batch, step):
        height, width = (side * self.encoders.factor for side in batch["latent_mean"].shape[2:])
        assert batch["time_ids"][:, 4:].tolist() == [[height, width]] * len(batch["index"])
        if torch.is_grad_enabled():
            shapes.append((width, height))
        return loss(self, phase, batch, step)

    monkeypatch.setattr(Denoising, "loss", seen)
    recipe = settings.FinetuneRecipe(
        model=str(sdxl),
        data=f"{photos}=2 | {art}",
        resolution=64,
        buckets=True,
        bucket_step=16,
        bucket_least=2,
        score_column="score",
        min_score=1,
        validation=2,
        validation_every=3,
        steps=8,
        batch=2,
        checkpoint_every=4,
        sample_every=0,
        learning_rate=1e-3,
        cache_variants=3,
        log="none",
    )
    execute(recipe, tmp_path / "straight")
    assert len(shapes) == 8 and len(set(shapes)) > 1
    execute(dataclasses.replace(recipe, steps=4), tmp_path / "half", tmp_path / "run")
    execute(recipe, tmp_path / "resumed", tmp_path / "run")
    assert shapes[8:] == shapes[:8]
    one, two = (load_file(tmp_path / name / UNET) for name in ("straight", "resumed"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    figures = [
        [{**json.loads(line), "seconds": 0} for line in (run / "losses.jsonl").read_text().splitlines()]
        for run in (tmp_path / "straight-run", tmp_path / "run")
    ]
    # The run of four steps measured at its own last step too.
    assert [entry["loss"] for entry in figures[0]] == [entry["loss"] for entry in figures[1]]
    assert figures[0][-1]["validation/loss"] == figures[1][-1]["validation/loss"]
