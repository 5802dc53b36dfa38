"""One training from its recipe to its result, as the command line sees it."""

from __future__ import annotations

import pytest

from accel.cli import main
from accel.distill import recipes
from accel.distill.data.encoders import Encoders
from accel.distill.run import note_size
from accel.errors import Notice
from accel.models.source import open_source


def test_a_resolution_that_is_not_the_models_own_is_said(smallest, recwarn):
    encoders = Encoders(open_source(smallest))
    with pytest.warns(Notice, match="resolution 64 is not the model's own, 32 px: --resolution 32"):
        note_size(recipes.changed(recipes.tiny(), resolution=64), encoders)
    recwarn.clear()
    note_size(recipes.changed(recipes.tiny(), resolution=32), encoders)
    assert not [entry for entry in recwarn if issubclass(entry.category, Notice)]


def test_a_training_says_once_that_it_is_ready_and_nothing_unlabelled(smallest, six_images, tmp_path, capsys):
    words = f"finetune --model {smallest} --data {six_images} --out {tmp_path / 'out'} --resolution 32 --train-steps 1"
    assert main(["distill", *words.split(), "--batch", "1", "--sample-every", "0", "--log", "none"]) == 0
    printed = "".join(capsys.readouterr())
    assert printed.count("is ready") == 1 and "0:00:00 0:00:00" not in printed
