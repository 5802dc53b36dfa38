"""The resumable loop."""

from __future__ import annotations

import pytest
import torch

from accel.distill.training import fit
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
