"""A training's result on the hub: what is sent, what is refused before a training begins, and what stays private."""

from __future__ import annotations

import json

import pytest
import yaml

from accel.cli import main
from accel.errors import UserError
from accel.publishing.trained import prepared_trained, push_trained

REPO = "someone/student"


def words(model, images, out, *more):
    text = f"finetune --model {model} --data {images} --out {out} --resolution 64 --train-steps 1 --batch 1 --log none"
    return ["distill", *text.split(), "--sample-steps", "1", "--cache", "none", *more]


@pytest.fixture(scope="module")
def trained(small, six_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "out"
    assert main(words(small, six_images, out)) == 0
    return out


def test_training_pushes_its_result_in_one_commit(small, six_images, tmp_path, hub, capsys):
    out = tmp_path / "out"
    assert main(words(small, six_images, out, "--push", REPO, "--license", "openrail++", "--private")) == 0
    repo = hub.repos[REPO]
    files = repo.files()
    assert repo.private and len(repo.commits) == 2  # the first one is the hub's own
    assert set(files) - {".gitattributes"} == {
        path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()
    }
    head = yaml.safe_load(files["README.md"].data.decode().split("---\n")[1])
    assert head["license"] == "openrail++" and head["library_name"] == "diffusers"
    assert files["unet/diffusion_pytorch_model.safetensors"].lfs and "samples.png" in files
    assert REPO in capsys.readouterr().out


def test_no_path_of_this_machine_is_sent(trained):
    made = prepared_trained(trained, licence="mit")
    record = json.loads(made.files["training.json"])
    assert record["recipe"]["model"] and "/" not in record["recipe"]["model"] + record["recipe"]["data"]
    sent = [held if isinstance(held, bytes) else held.read_bytes() for held in made.files.values()]
    assert not any(str(trained.parent.parent).encode() in data for data in sent)


def test_what_the_hub_would_refuse_is_refused_before_training(small, six_images, tmp_path, hub, monkeypatch, capsys):
    out = tmp_path / "out"
    for more, said in (
        (["--push", REPO], "a card needs a licence"),
        (["--push", "no name", "--license", "mit"], "'no name' is no repository of the hub"),
        (["--license", "mit"], "--license and --private are for --push"),
    ):
        assert main(words(small, six_images, out, *more)) != 0
        assert said in capsys.readouterr().err and not (tmp_path / "out-run").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(words(small, six_images, out, "--push", REPO, "--license", "mit")) != 0
    assert not (tmp_path / "out-run").exists() and REPO not in hub.repos


def test_accel_push_takes_a_trained_folder(trained, hub, capsys):
    assert main(["push", str(trained), REPO, "--license", "mit", "--dry-run"]) == 0
    assert "unet/config.json" in capsys.readouterr().out and not hub.repos
    assert main(["push", str(trained), REPO, "--license", "mit", "--base-model", "a/b"]) == 0
    head = yaml.safe_load(hub.repos[REPO].files()["README.md"].data.decode().split("---\n")[1])
    assert head["license"] == "mit" and head["base_model"] == "a/b"
    assert main(["push", str(trained), REPO, "--license", "mit", "--engine-files"]) != 0
    assert "--engine-files is for bundles" in capsys.readouterr().err


def test_a_folder_that_is_no_result_is_refused(trained, tmp_path):
    (tmp_path / "training.json").write_text('{"recipe": 3}')
    with pytest.raises(UserError, match="is no record of a training"):
        push_trained(tmp_path, REPO, licence="mit")
