"""`accel run`: requests that are met, and those that are refused with one message that has a fix."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

_LOADED = {}


@pytest.fixture
def loaded_once(monkeypatch):
    """Engines are loaded once for all requests that are refused after that."""
    from accel.pipeline import opening

    load = opening.load_engine

    def cached(bundle, name, engine="auto", **options):
        key = (bundle.path, name, engine, tuple(sorted(options.items())))
        if key not in _LOADED:
            _LOADED[key] = load(bundle, name, engine, **options)
        return _LOADED[key]

    monkeypatch.setattr(opening, "load_engine", cached)


@pytest.mark.parametrize("damage", ["truncated", "edited", "deleted", "newer"])
def test_a_damaged_bundle_is_not_run(accel, refused, bundle_copy, tmp_path, edit_manifest, damage, contents):
    weights = bundle_copy / "unet/model.safetensors"
    if damage == "truncated":
        os.truncate(weights, 1000)
    elif damage == "edited":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "deleted":
        weights.unlink()
    else:
        edit_manifest(bundle_copy, lambda data: data.update(schema=99))
    before = contents(bundle_copy)
    err = refused("run", bundle_copy, "--prompt", "x", "--out", tmp_path / "o.png")
    assert ("schema 99" if damage == "newer" else "unet/model.safetensors") in err
    assert not (tmp_path / "o.png").exists()
    code, out, err = accel("inspect", bundle_copy)
    assert code == 1
    assert ("DAMAGED" in out) or damage == "newer"
    assert contents(bundle_copy) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--height", "256"], ["256", "32 to 64"]),
        (["--width", "65"], ["65", "32 to 64"]),
        (["--height", "0"], ["height 0", "32 to 64"]),
        (["--width", "-64"], ["-64"]),
        (["--steps", "0"], ["steps"]),
        (["--steps", "-3"], ["steps"]),
        (["--steps", "100000"], ["steps"]),
        (["--guidance", "nan"], ["guidance", "nan"]),
        (["--guidance", "inf"], ["guidance", "inf"]),
        (["--guidance", "-2"], ["guidance"]),
        (["--images", "0"], ["0"]),
        (["--images", "-1"], ["-1"]),
        (["--seed", "-1"], ["seed"]),
        (["--sampler", "plms"], ["plms", "dpmpp_2m"]),
        (["--engine", "cudnn"], ["cudnn", "onnxruntime"]),
        (["--engine", "eager", "--device", "cuda"], ["cuda"]),
        (["--engine", "eager", "--device", "toaster"], ["toaster"]),
        (["--engine", "eager", "--dtype", "fp8"], ["fp8"]),
        (["--engine", "onnxruntime", "--dtype", "fp16"], ["dtype"]),
        (["--engine", "onnxruntime", "--provider", "cuda"], ["cuda"]),
        (["--engine", "onnxruntime", "--threads", "-1"], ["threads"]),
        (["--engine", "openvino", "--device", "toaster"], ["toaster"]),
        (["--engine", "openvino", "--threads", "-1"], ["threads"]),
        (["--prompt", ""], ["prompt is empty"]),
        (["--prompt", "  \t"], ["prompt is empty"]),
        (["--out", "picture"], ["picture", "image file"]),
        (["--out", "picture.exe"], ["picture.exe"]),
    ],
)
def test_a_request_that_cannot_be_met_says_why(
    refused, loaded_once, smallest_bundle, tmp_path, monkeypatch, args, words
):
    monkeypatch.chdir(tmp_path)
    defaults = {"--engine": "onnxruntime", "--out": "o.png"}
    rest = [item for key, value in defaults.items() if key not in args for item in (key, value)]
    err = refused("run", smallest_bundle, "--prompt", "x", *args, *rest)
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_is_not_installed_says_how_to_install_it(refused, smallest_bundle, tmp_path, monkeypatch):
    from accel.engines import openvino

    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    err = refused("run", smallest_bundle, "--prompt", "x", "--engine", "openvino", "--out", tmp_path / "o.png")
    assert "openvino is not installed" in err and 'pip install "accel-diffusion[openvino]"' in err


def test_auto_goes_on_without_an_engine_that_is_not_installed(accel, smallest_bundle, tmp_path, monkeypatch):
    from accel.engines import openvino

    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    code, _, err = accel("run", smallest_bundle, "--prompt", "x", "--out", tmp_path / "o.png")
    assert code == 0
    assert "engine: onnxruntime" in err
    assert (tmp_path / "o.png").exists()


def test_a_prompt_that_is_too_long_is_cut_with_a_note_that_says_where(accel, smallest_bundle, tmp_path):
    prompt = "the cat " * 40 + "zebra"
    out = tmp_path / "o.png"
    code, _, err = accel("run", smallest_bundle, "--prompt", prompt, "--engine", "onnxruntime", "--out", out)
    assert code == 0
    assert err.count("note:") == 1 and "zebra" in err
    assert (tmp_path / "o.png").exists()


def test_several_prompts_and_images_are_numbered_and_reported_as_json(accel, smallest_bundle, tmp_path):
    code, out, _ = accel(
        "run",
        smallest_bundle,
        "--prompt",
        "the cat",
        "--prompt",
        "the dog",
        "--images",
        2,
        "--seed",
        5,
        "--width",
        64,
        "--engine",
        "onnxruntime",
        "--json",
        "--out",
        tmp_path / "new" / "o.png",
    )
    report = json.loads(out)
    assert code == 0
    assert report["seeds"] == [5, 6, 7, 8]
    assert sorted(map(str, (tmp_path / "new").iterdir())) == sorted(report["images"]) and len(report["images"]) == 4
    assert set(report["seconds"]) >= {"text_encoder", "unet", "vae_decoder", "total"}


def test_no_image_is_overwritten_unless_asked(accel, refused, smallest_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["run", smallest_bundle, "-p", "x", "--steps", 1, "--engine", "onnxruntime"]
    assert "out.png" in accel(*words)[1] and "out-1.png" in accel(*words)[1]
    before = (tmp_path / "out.png").read_bytes()
    assert "--overwrite" in refused(*words, "--out", "out.png", "--seed", 1)
    assert (tmp_path / "out.png").read_bytes() == before
    assert accel(*words, "--out", "out.png", "--overwrite", "--seed", 1)[0] == 0
    assert (tmp_path / "out.png").read_bytes() != before


def test_prompts_of_a_file_are_drawn_and_a_missing_image_is_refused_before_loading(
    accel, refused, smallest_bundle, tmp_path, monkeypatch
):
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\nthe dog\n")
    words = ["run", smallest_bundle, "--prompt-file", file, "--steps", 1, "--engine", "onnxruntime"]
    _, out, _ = accel(*words, "-o", tmp_path / "o.png", "--json")
    assert len(json.loads(out)["images"]) == 2
    monkeypatch.setattr("accel.loading.load", lambda *_, **__: pytest.fail("it was loaded first"))
    for option in ("--image", "--control"):
        assert "no such file" in refused(*words, option, tmp_path / "none.png")


def test_an_image_file_that_exists_survives_a_run_that_fails(refused, smallest_bundle, tmp_path):
    out = tmp_path / "o.png"
    out.write_bytes(b"precious")
    refused(
        "run", smallest_bundle, "--prompt", "x", "--steps", 0, "--engine", "onnxruntime", "--out", out, "--overwrite"
    )
    assert out.read_bytes() == b"precious"


def test_an_image_in_an_unwritable_place_is_refused_before_the_work(
    refused, smallest_bundle, user_folder, monkeypatch, drop_privileges
):
    bundle = shutil.copytree(smallest_bundle, user_folder / "bundle")
    locked = user_folder / "locked"
    locked.mkdir(mode=0o555)
    monkeypatch.setattr("accel.pipeline.Pipeline.__call__", lambda *_, **__: pytest.fail("the work was done first"))
    drop_privileges()
    for out in (locked / "o.png", locked / "deep" / "o.png"):
        assert str(locked) in refused("run", bundle, "--prompt", "x", "--engine", "onnxruntime", "--out", out)


def test_an_image_below_a_file_or_over_a_folder_is_refused(refused, smallest_bundle, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for out in (tmp_path / "file" / "o.png", tmp_path / "folder.png"):
        refused("run", smallest_bundle, "--prompt", "x", "--engine", "onnxruntime", "--out", out)


def test_a_bundle_that_may_not_be_read_is_named(refused, smallest_bundle, user_folder, drop_privileges):
    bundle = Path(shutil.copytree(smallest_bundle, user_folder / "bundle"))
    (bundle / "unet/model.safetensors").chmod(0)
    drop_privileges()
    err = refused("run", bundle, "--prompt", "x", "--engine", "onnxruntime", "--out", user_folder / "o.png")
    assert "unet/model.safetensors" in err


def test_a_model_of_digits_says_what_it_can_draw(accel, tmp_path):
    words = ["run", "digits/4step", "--steps", 1, "--engine", "eager", "-p"]
    _, _, err = accel(*words, "a fox in the snow", "-o", tmp_path / "fox.png")
    assert "draws handwritten digits alone" in err
    _, _, err = accel(*words, "a handwritten seven", "-o", tmp_path / "seven.png")
    assert "digits alone" not in err
