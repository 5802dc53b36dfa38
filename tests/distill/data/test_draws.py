"""Noise that comes with a batch is the noise that a loss would draw, and nothing is left to draw."""

import dataclasses

import pytest
import torch

from accel.distill import recipes, settings
from accel.distill.data import rng
from accel.distill.data.draws import Ahead, Draw, take
from accel.distill.data.encoders import encoded
from accel.distill.data.examples import Examples, loader
from accel.distill.registry import entry_of, load
from accel.distill.run import encoders_of
from accel.distill.sources.open_data import open_data
from accel.distill.training.method import OptimizerPhase

COMMON: dict = dict(data="digits", resolution=64, random_flip=False, cache="none", batch=4, seed=3)
METHODS = {
    "kd": recipes.changed(recipes.tiny(), offset_noise=0.1, input_perturbation=0.1, mixed_precision="no"),
    "vae": settings.TinyVaeRecipe(width=8, blocks=1, mixed_precision="no"),
    "dmd2": settings.DMD2Recipe(ratio=2, mixed_precision="no"),
    "dmd2 in one step": settings.DMD2Recipe(few_steps=1, ratio=1, adversarial_weight=0.0, mixed_precision="no"),
    "lcm": settings.LCMRecipe(learning_rate=1e-6, guidance_high=9.0, mixed_precision="no"),
    "dmd2 of real images": settings.DMD2Recipe(ratio=2, backward_simulation=False, mixed_precision="no"),
}


def batches(recipe, encoders, ahead, workers=0):
    examples = Examples(open_data("digits"), seed=recipe.seed, resolution=64, random_flip=False)
    return loader(examples, batch=recipe.batch, ahead=ahead, workers=workers)


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_finds_all_of_its_numbers_in_the_batch(request, name, monkeypatch):
    folder = request.getfixturevalue("sd15" if name == "kd" else "small")
    recipe = recipes.changed(METHODS[name], **COMMON, model=str(folder))
    encoders = encoders_of(recipe)
    method = load(entry_of(recipe).factory)(recipe, encoders)
    method.place(torch.device("cpu"), torch.float32)
    drawn = Ahead(tuple(method.phases), recipe.seed, encoders.latent_channels, encoders.factor)
    streams = batches(recipe, encoders, None), batches(recipe, encoders, drawn)
    for step in range(3):
        bare, full = map(next, streams)
        bare, full = encoded(bare, encoders), encoded(full, encoders)
        for phase in method.phases:
            if phase.due(step):
                wanted = method.loss(phase, bare, step)[0].detach()
                with monkeypatch.context() as patch:
                    for function in ("normal", "integers"):
                        patch.setattr(rng, function, lambda *given: pytest.fail(f"drawn in the loss: {given}"))
                    assert torch.equal(method.loss(phase, full, step)[0].detach(), wanted), (phase.name, step)


@pytest.mark.own_process
def test_processes_draw_the_same_and_only_what_is_due(small):
    recipe = recipes.changed(METHODS["dmd2"], **COMMON, model=str(small))
    encoders = encoders_of(recipe)
    turns = load(entry_of(recipe).factory)(recipe, encoders).phases
    ahead = Ahead(tuple(turns), recipe.seed, encoders.latent_channels, encoders.factor)
    here, there = batches(recipe, encoders, ahead), batches(recipe, encoders, ahead, workers=2)
    try:
        for step in range(3):
            ours, theirs = next(here), next(there)
            keys = {key for key in ours if key.startswith("drawn ")}
            assert ("drawn matching 1" in keys) == (step % 2 == 0) and "drawn critic 1" in keys
            assert all(torch.equal(ours[key], theirs[key]) for key in keys)
    finally:
        there.close()


def test_a_micro_batch_of_any_process_belongs_to_its_step():
    """Two processes with two micro-batches each: examples 0 to 7 are of step 0."""
    turns = (OptimizerPhase("seldom", (), every=2, start=1, draws=(Draw("noise"),)),)
    ahead = Ahead(turns, 0, 4, 8)
    examples = Examples(open_data("digits"), seed=0, resolution=64, random_flip=False)
    for rank in (0, 1):
        stream = loader(examples, batch=2, accumulation=2, rank=rank, world=2, ahead=ahead)
        found = ["drawn noise 0" in next(stream) for _ in range(6)]
        assert found == [False, False, True, True, False, False]


def test_a_draw_has_the_shape_and_the_range_that_it_says():
    batch = {"index": [5, 9], "latent_mean": torch.zeros(2, 4, 3, 2)}
    assert take(batch, 1, Draw("noise", 2)).equal(rng.normal(1, [5, 9], "noise", (4, 3, 2), 2))
    assert take(batch, 1, Draw("offset", dims=1)).equal(rng.normal(1, [5, 9], "offset", (4,)))
    assert take(batch, 1, Draw("timestep", high=7)).equal(rng.integers(1, [5, 9], "timestep", 0, 7))
    other = dataclasses.replace(Draw("noise"), draw=1)
    assert take(batch | {other.key: batch["latent_mean"]}, 1, other) is batch["latent_mean"]
