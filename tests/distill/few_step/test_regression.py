"""Pairs of the teacher's ODE, and the warm-up on them."""

import importlib.machinery
import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from accel.distill import recipes, settings
from accel.distill.data.encoders import Encoders
from accel.distill.few_step import ode_pairs, text_to_image
from accel.distill.few_step.regression import Regression, pseudo_huber
from accel.distill.run import execute
from accel.distill.sources.open_data import open_data
from accel.errors import MissingPackage, UserError
from accel.models.source import open_source

UNET = "unet/diffusion_pytorch_model.safetensors"


def recipe(model, **fields):
    common = dict(
        model=str(model),
        data="digits",
        resolution=64,
        random_flip=False,
        mixed_precision="no",
        steps=3,
        batch=16,
        learning_rate=1e-3,
        pair_count=70,
        pair_steps=2,
        pair_guidance=2.0,
        checkpoint_every=10,
        sample_every=0,
        log="none",
    )
    return recipes.changed(settings.RegressionRecipe(), **common | fields)


@pytest.fixture(scope="module")
def made(sd15, tmp_path_factory):
    given, encoders = recipe(sd15), Encoders(open_source(sd15))
    folder = tmp_path_factory.mktemp("pairs")
    return given, encoders, folder, ode_pairs.make(given, open_data("digits"), encoders, folder)


def test_a_pair_is_what_diffusers_makes_of_its_noise(made):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    given, encoders, _, found = made
    row = found.rows([65])
    pipeline = StableDiffusionPipeline.from_pretrained(encoders.source.path, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    wanted = pipeline(
        row["caption"],
        latents=row["z"],
        num_inference_steps=2,
        guidance_scale=2.0,
        output_type="latent",
        height=64,
        width=64,
    ).images
    assert torch.allclose(row["latent_mean"], wanted, atol=2e-3 * float(wanted.abs().max()))
    assert row["z"].std().item() == pytest.approx(1, abs=0.1)


def test_making_goes_on_where_it_was_interrupted(made, monkeypatch):
    given, encoders, folder, found = made
    before = found.rows([3, 69])
    ode_pairs.shard_file(folder, 1).unlink()
    calls = []
    real = ode_pairs.solve
    monkeypatch.setattr(ode_pairs, "solve", lambda *args: calls.append(args[3][0]) or real(*args))
    again = ode_pairs.make(given, open_data("digits"), encoders, folder).rows([3, 69])
    assert calls == [64] and torch.equal(before["latent_mean"], again["latent_mean"])
    assert before["caption"] == again["caption"]


def test_pairs_of_other_settings_are_refused(made):
    given, encoders, folder, _ = made
    with pytest.raises(UserError, match="another guidance"):
        ode_pairs.make(recipes.changed(given, pair_guidance=3.0), open_data("digits"), encoders, folder)


def test_every_pair_comes_once_in_an_epoch_whoever_reads(made):
    given, _, _, found = made
    given = recipes.changed(given, batch=7)
    streams = [ode_pairs.batches(found, given, 0, rank=rank, world=2) for rank in range(2)]
    names = [name for _ in range(5) for stream in streams for name in next(stream)["name"]]
    assert sorted(names) == sorted(f"pair {row}" for row in range(70))


def test_a_student_of_sdxl_is_told_the_size_that_its_teacher_was_told(sdxl, tmp_path, monkeypatch):
    from diffusers import StableDiffusionXLPipeline

    told = {"teacher": [], "student": []}
    sizes = StableDiffusionXLPipeline._get_add_time_ids

    def watched(*args, **kwargs):
        made = sizes(*args, **kwargs)
        told["teacher"].append(made)
        return made

    monkeypatch.setattr(StableDiffusionXLPipeline, "_get_add_time_ids", watched)
    monkeypatch.setattr(ode_pairs, "SHARD", 2)
    added = text_to_image.added_conditions

    def of_the_student(batch):
        told["student"].append(batch["time_ids"])
        return added(batch)

    monkeypatch.setattr(text_to_image, "added_conditions", of_the_student)
    execute(recipe(sdxl, pair_count=2, pair_steps=1, steps=1, batch=2), tmp_path / "out")
    (teacher, *_), (student,) = told.values()
    assert torch.equal(student, teacher.expand(2, 6).float()) and student[0, 0] == 64


def test_the_warm_up_lowers_the_error_and_its_result_is_a_one_step_student(sd15, made, tmp_path):
    torch.set_num_threads(1)
    _, _, folder, _ = made
    given = recipe(sd15, pairs=str(folder), steps=12)
    execute(given, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out-run/losses.jsonl").read_text().splitlines()]
    assert lines[-1]["regression"] < 0.7 * lines[0]["regression"]
    assert json.loads((tmp_path / "out/sampler.json").read_text())["timesteps"] == [999]
    # And DMD2 goes on from it.
    dmd2 = recipes.changed(
        settings.DMD2Recipe(),
        model=str(tmp_path / "out"),
        teacher=str(sd15),
        data="digits",
        resolution=64,
        few_steps=1,
        cache="none",
        steps=1,
        batch=2,
        sample_every=0,
        log="none",
    )
    execute(dmd2, tmp_path / "next")
    assert set(load_file(tmp_path / "next" / UNET)) == set(load_file(tmp_path / "out" / UNET))


def test_pseudo_huber_is_the_distance_far_from_zero():
    x = torch.zeros(2, 4, 8, 8)
    wanted = torch.full_like(x, 3.0)
    distance = (9.0 * 256) ** 0.5
    assert pseudo_huber(x, wanted).item() == pytest.approx(distance, rel=1e-3)
    assert pseudo_huber(x, x).item() == 0


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        (dict(loss="l7"), UserError, "invalid loss"),
        (dict(timestep=1000), UserError, "invalid timestep: 1000"),
        (dict(loss="lpips"), MissingPackage, "lpips"),
        (dict(pair_count=0), UserError, "pair_count"),
    ],
)
def test_what_cannot_be_is_said(sd15, tmp_path, fields, error, said):
    with pytest.raises(error, match=said):
        execute(recipe(sd15, **fields), tmp_path / "out")


def test_lpips_compares_decoded_images_and_its_slope_reaches_the_latent(sd15, monkeypatch):
    """Of images in -1..1, as the package expects; a stand-in takes its place, which is not on every machine."""
    seen = []

    class LPIPS(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, images, wanted):
            seen.append((images, wanted))
            return self.weight * (images - wanted).square().mean((1, 2, 3), keepdim=True)

    package = types.ModuleType("lpips")
    package.LPIPS, package.__spec__ = LPIPS, importlib.machinery.ModuleSpec("lpips", None)
    monkeypatch.setitem(sys.modules, "lpips", package)
    given = recipe(sd15, loss="lpips")
    encoders = Encoders(open_source(given.model))
    method = Regression(given, encoders)
    method.place(torch.device("cpu"), torch.float32)
    wanted = torch.randn(2, 4, 8, 8)
    batch = {"z": torch.randn(2, 4, 8, 8), "latent_mean": wanted} | encoders.prompts(["a cat", "a dog"])
    error, _ = method.loss(method.phases[0], batch, 0)
    error.backward()
    (images, compared), expected = seen[0], encoders.vae.decode(wanted / encoders.vae.config.scaling_factor).sample
    assert torch.equal(compared, expected.clamp(-1, 1)) and images.shape == compared.shape
    without = [n for n, p in method.unet.named_parameters() if p.grad is not None and not (p.grad != 0).any()]
    # In the middle there is one position: its self-attention has nothing to choose, and queries and keys no slope.
    assert {n.partition(".attn1.")[2] for n in without} <= {"to_q.weight", "to_k.weight"}
    assert all(n.startswith("mid_block") for n in without)
    assert sum(p.grad is not None for p in method.unet.parameters()) == len(list(method.unet.parameters()))
    assert method.perceptual.weight.grad is None and all(p.grad is None for p in encoders.vae.parameters())
