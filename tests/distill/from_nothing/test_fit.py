"""The resumable loop."""

from __future__ import annotations

import pytest
import torch

from accel.distill.from_nothing import fit
from accel.errors import UserError


def test_run_folder_of_other_settings_is_refused(tmp_path):
    stage = dict(name="linear", batch=4, learning_rate=1e-3, run=tmp_path, every=1, ema=0.9, seed=0)
    model = torch.nn.Linear(2, 1)

    def loss(generator):
        return model(torch.randn(4, 2, generator=generator)).square().mean()

    fit.fit(fit.Stage(steps=2, **stage), model, loss)
    with pytest.raises(UserError, match="other settings"):
        fit.fit(fit.Stage(steps=3, **stage), model, loss)


def test_loss_that_is_not_finite_stops_with_a_fix(tmp_path):
    stage = fit.Stage(name="bad", steps=3, batch=1, learning_rate=1e-3, run=tmp_path, every=1, ema=0.9, seed=0)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="nan at step 0") as caught:
        fit.fit(stage, model, lambda generator: model(torch.tensor([float("nan")])).sum())
    assert "learning rate" in caught.value.fix


def test_hours_become_steps_once_and_a_resumed_run_keeps_them(tmp_path, monkeypatch):
    model = torch.nn.Linear(4, 1)
    before = model.weight.detach().clone()
    ticks = (0.5 * tick for tick in range(100))
    monkeypatch.setattr(fit.time, "monotonic", lambda: next(ticks))

    def loss(generator):
        return model(torch.randn(2, 4, generator=generator)).square().mean()

    plan = tmp_path / "run" / "plan.json"
    assert fit.planned_steps(plan, "unet", 60.0, model, loss) == 120, "half a second a step"
    monkeypatch.setattr(fit.time, "monotonic", lambda: 1 / 0)
    assert fit.planned_steps(plan, "unet", 60.0, model, loss) == 120, "it was planned before"
    assert torch.equal(before, model.weight) and model.weight.grad is None
    with pytest.raises(UserError, match="60 s for unet, and now it would be 600 s") as caught:
        fit.planned_steps(plan, "unet", 600.0, model, loss)
    assert "--hours" in caught.value.fix


def test_somebody_may_look_at_the_averaged_model_at_every_checkpoint(tmp_path):
    stage = fit.Stage(name="seen", steps=5, batch=1, learning_rate=1e-2, run=tmp_path, every=2, ema=0.9, seed=0)
    model, seen = torch.nn.Linear(1, 1), []
    fit.fit(
        stage,
        model,
        lambda generator: model(torch.ones(1, 1)).square().sum(),
        lambda step, average: seen.append((step, average.weight.item())),
    )
    assert [step for step, _ in seen] == [2, 4, 5] and seen[-1][1] == model.weight.item()
