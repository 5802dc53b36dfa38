"""One training from its recipe to its result, as the command line sees it."""

from __future__ import annotations

import json
import shutil

import pytest

from accel.cli import main
from accel.distill import recipes, run, settings
from accel.distill.data.encoders import Encoders
from accel.distill.run import note_size
from accel.errors import Notice, UserError
from accel.models.source import open_source
from accel.sampling.noise_schedule import NoiseSchedule


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


def test_the_resolution_is_the_models_own_where_none_is_given(sd15):
    recipe = settings.FinetuneRecipe(model=str(sd15))
    assert run.with_resolution(recipe, run.encoders_of(recipe)).resolution == 64
    given = settings.FinetuneRecipe(model=str(sd15), resolution=32)
    assert run.with_resolution(given, run.encoders_of(given)).resolution == 32


def test_buckets_have_sides_that_the_unet_can_halve(sd15, six_images, tmp_path):
    recipe = settings.FinetuneRecipe(model=str(sd15), data=str(six_images), buckets=True, bucket_step=8, log="none")
    with pytest.raises(UserError, match="buckets of steps of 8 px: not a multiple of"):
        run.execute(recipe, tmp_path / "out")
    assert not (tmp_path / "out-run").exists()


def test_an_attention_that_nothing_takes_is_refused(sd15, tmp_path):
    recipe = settings.TinyVaeRecipe(model=str(sd15), data="digits", attention="sdpa", log="none")
    with pytest.raises(UserError, match="--attention sdpa has no effect on AutoencoderTiny"):
        run.execute(recipe, tmp_path / "out")
    assert not (tmp_path / "out-run").exists()


def test_fields_that_samplers_alone_read_do_not_refuse_training(sd15, tmp_path):
    source = shutil.copytree(sd15, tmp_path / "model")
    path = source / "scheduler/scheduler_config.json"
    plain = NoiseSchedule.of_training(json.loads(path.read_text()))
    odd = dict(use_karras_sigmas=True, algorithm_type="sde-dpmsolver++", clip_sample=True, nobody_knows_this=3)
    config = json.loads(path.read_text()) | odd
    schedule = NoiseSchedule.of_training(config)
    assert (schedule.alphas_cumprod == plain.alphas_cumprod).all()
    with pytest.raises(UserError):
        NoiseSchedule.of_training(config | {"prediction_type": "none"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "--model", "x"], "--recipe sd15_tiny or segmind_tiny"),
        (["tiny", "--model", "digits"], "--recipe digits_tiny"),
        (["tiny", "--model", "x", "--recipe", "sd15_tiny"], ""),
        (["ssd-1b", "--model", "x"], ""),
    ],
)
def test_defaults_that_are_not_published_say_so(arguments, said, tmp_path, capfd):
    main(["distill", *arguments, "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    error = capfd.readouterr().err
    assert ("not the published setting" in error) == bool(said) and said in error
