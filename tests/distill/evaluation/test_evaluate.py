"""`accel evaluate` from the model to the table: what is made, resumed, shared, measured and refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from PIL import Image

from accel.assets import DIGITS
from accel.cli import main
from accel.distill.evaluation import digits as digits_quality
from accel.distill.evaluation import evaluate, generators, metrics, own_sets, protocols
from accel.distill.evaluation.protocols import Metric, Preparation
from accel.distill.evaluation.work_share import Shard
from accel.distill.sources import digits
from accel.errors import UserError
from accel.sampling import Sampling

FAST = dict(steps=2, limit=6)


def drawn(out: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((out / "pictures").iterdir())]).astype(int)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Six digits in two steps, and their result."""
    out = tmp_path_factory.mktemp("made") / "out"
    return out, evaluate.evaluate("digits", "digits", out, **FAST)


@pytest.fixture
def never_made(monkeypatch):
    monkeypatch.setattr(generators, "load", lambda *_: pytest.fail("an image was made again"))


@pytest.fixture
def coco(monkeypatch):
    """A protocol of captions and real images, small, judged by the mean colour of each image."""

    def see(images):
        return np.stack([np.asarray(image, np.float64).mean((0, 1)) / 255 for image in images])

    small = dataclasses.replace(
        protocols.BK_SDM_COCO30K,
        images=4,
        size=64,
        reference_images=3,
        dtype="fp32",
        seed=5,
        sampling=Sampling(sampler="pndm", steps=2, guidance=7.5),
        metrics=(Metric(name="FID", kind="frechet", extractor="coarse", prepare=Preparation(size=32, jpeg=True)),),
    )
    monkeypatch.setattr(metrics, "EXTRACTORS", {"coarse": (lambda device: see, "numpy", "numpy")})
    monkeypatch.setattr(protocols, "PROTOCOLS", MappingProxyType({small.id: small}))
    return small


@pytest.fixture
def real(tmp_path):
    """Three real images and four captions."""
    folder = tmp_path / "real"
    folder.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (50, 70, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg")
    captions = tmp_path / "metadata.csv"
    captions.write_text('file_name,text\na.jpg,the cat\nb.jpg,"the dog, sitting"\nc.jpg,a cat\nd.jpg,a dog\n')
    return dict(reference=folder, captions=captions)


# ------------------------------------------------------------------------------------------------------------- result


def test_the_result_says_what_was_measured_and_how(made):
    out, result = made
    assert json.loads((out / "result-6-images.json").read_text()) == result
    assert [figure["name"] for figure in result["figures"]] == ["prompt accuracy", "Frechet distance"]
    assert {figure["protocol"] for figure in result["figures"]} == {result["protocol"]} == {"digits[steps=2,images=6]"}
    assert result["sampling"]["sampler"] == "dpmpp_2m" and result["sampling"]["guidance"] == 3
    assert result["pictures_made"] == 6 and result["images"] == 6
    assert result["model"]["name"] == "digits" and len(result["model"]["digest"]) == 64
    assert result["machine"]["cpu"] and result["versions"]["scikit-learn"]
    assert all(path.is_file() for path in (out / result["pictures"]).iterdir())
    assert drawn(out).shape == (6, 64, 64, 3)


def test_the_figures_are_those_of_the_images(made):
    out, result = made
    images = torch.from_numpy(drawn(out)).permute(0, 3, 1, 2).float() / 127.5 - 1
    wanted = digits_quality.evaluate(images, torch.arange(6))
    accuracy, distance = result["figures"]
    assert accuracy["value"] == wanted["prompt_accuracy"]
    assert distance["value"] == pytest.approx(wanted["frechet_distance"], rel=1e-9)


def test_the_floor_of_all_images_is_the_floor_of_the_model_card(tmp_path):
    """500 images, 50 of each digit: the floor of `digits_quality`, which the shipped model's card quotes."""
    black = tmp_path / "black.png"
    Image.new("RGB", (64, 64)).save(black)
    wanted = [digit for _, digit in digits.prompt_set(digits.HELD_OUT_PER_DIGIT)]
    _, distance = own_sets.digit_figures([black] * 500, wanted)
    card = json.loads((DIGITS / "teacher" / "quality.json").read_text())
    assert distance["floor"] == pytest.approx(card["frechet_floor"], rel=1e-6)


def test_digits_are_drawn_as_the_model_cards_figures_were(made):
    """The same noise, sampler and prompts as `digits_quality.generate`: a figure can be compared with the card's."""
    from accel.distill.from_nothing.parts import load

    texts = [text for text, _ in digits.prompt_set(1)[:6]]
    images = digits_quality.generate(load(DIGITS / "teacher"), texts, guidance=3.0, steps=2)
    wanted = ((images / 2 + 0.5) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(drawn(made[0]) - wanted).max() <= 1


# ---------------------------------------------------------------------------------------------- resumed and shared runs


def test_images_that_are_there_are_kept_and_damaged_or_missing_ones_made_again(made, tmp_path, monkeypatch):
    out = Path(shutil.copytree(made[0], tmp_path / "out"))
    (out / "pictures" / "00001.png").unlink()
    damaged = out / "pictures" / "00004.png"
    damaged.write_bytes(damaged.read_bytes()[:300])
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "pictures").iterdir() if path != damaged}
    again = evaluate.evaluate("digits", "digits", out, **FAST)
    assert again["pictures_made"] == 2
    assert {path.name: path.stat().st_mtime_ns for path in (out / "pictures").iterdir()}.items() >= kept.items()
    # In a batch of two, the last bit may come out otherwise.
    assert np.abs(drawn(out) - drawn(made[0])).max() <= 1


def test_a_finished_run_loads_no_model_and_a_longer_one_makes_only_what_is_new(made, tmp_path, never_made, monkeypatch):
    out = Path(shutil.copytree(made[0], tmp_path / "out"))
    assert evaluate.evaluate("digits", "digits", out, **FAST)["figures"] == made[1]["figures"]
    monkeypatch.undo()
    longer = evaluate.evaluate("digits", "digits", out, steps=2, limit=8)
    assert longer["pictures_made"] == 2 and longer["protocol"] == "digits[steps=2,images=8]"
    assert (out / "result-6-images.json").exists() and (out / "result-8-images.json").exists()


def test_another_request_in_the_same_folder_is_refused_and_costs_nothing(made, never_made):
    out, result = made
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for change, words in (
        ({"steps": 3}, "steps was 2 and is 3"),
        ({"guidance": 0}, "guidance was 3.0 and is 0.0"),
        ({"sampler": "euler"}, "sampler was dpmpp_2m and is euler"),
        ({"options": {"dtype": "bf16"}}, "dtype was fp32"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate.evaluate("digits", "digits", out, **FAST | change)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_two_processes_share_a_folder_and_make_the_same_images_as_one(made, tmp_path):
    out = tmp_path / "out"
    second = evaluate.evaluate("digits", "digits", out, **FAST, shard=Shard(1, 2), batch=2)
    assert second is None and not list(out.glob("result*"))
    assert sorted(path.name for path in (out / "pictures").iterdir()) == ["00001.png", "00003.png", "00005.png"]
    result = evaluate.evaluate("digits", "digits", out, **FAST, shard=Shard(0, 2), patience=5)
    assert result["pictures_made"] == 3 and result["processes"] == 2
    assert np.abs(drawn(out) - drawn(made[0])).max() <= 1


def test_rank_0_tells_whose_images_did_not_come(tmp_path):
    with pytest.raises(UserError, match=r"2 of 4 images .* 00001.png, 00003.png \(of rank 1\)"):
        evaluate.evaluate("digits", "digits", tmp_path / "out", steps=1, limit=4, shard=Shard(0, 2), patience=0.1)
    assert not list((tmp_path / "out").glob("result*"))


def test_ctrl_c_keeps_finished_images_and_the_next_run_goes_on(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "accel", "evaluate", "digits", "--steps", "4", "--batch", "1", "--out", out]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that was started in the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (out / "pictures" / "00001.png").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    there = sorted(path.name for path in (out / "pictures").iterdir())
    assert 2 <= len(there) < 400 and there == [f"{index:05d}.png" for index in range(len(there))]
    result = evaluate.evaluate("digits", "digits", out, steps=4, limit=len(there) + 2)
    assert result["pictures_made"] == 2


# -------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dmd2", "ddim", "euler"])
def test_a_bundle_makes_the_images_of_its_pipeline(sd15, sd15_bundle, tmp_path, sampler):
    """The same noise on both sides, the noise that a stochastic sampler adds included; the bundle, which takes two
    guided images at once, in parts."""
    how = dict(sampler=sampler, steps=3, guidance=2.0, limit=5)
    bundle = evaluate.evaluate(sd15_bundle, "digits", tmp_path / "bundle", **how, engine="onnxruntime")
    assert bundle["model"]["kind"] == "bundle" and bundle["engine"] == "onnxruntime"
    # The bundle was made for dpmpp_2m, 4 steps, guidance 5.
    changed = f"sampler={sampler},".replace("sampler=dpmpp_2m,", "")
    assert bundle["protocol"] == f"digits[{changed}steps=3,guidance=2,images=5]"
    evaluate.evaluate(sd15, "digits", tmp_path / "pipeline", **how)
    one, other = drawn(tmp_path / "bundle"), drawn(tmp_path / "pipeline")
    assert np.abs(one - other).max() <= 1
    assert np.abs(one[0] - one[1]).max() > 8, "images of different noise are different"


def test_a_bundle_draws_every_images_noise_once_however_it_cuts_the_batch(sd15_bundle, tmp_path):
    how = dict(sampler="dmd2", steps=2, guidance=2.0, limit=5, engine="onnxruntime")
    evaluate.evaluate(sd15_bundle, "digits", tmp_path / "whole", **how, batch=5)
    evaluate.evaluate(sd15_bundle, "digits", tmp_path / "single", **how, batch=1)
    assert np.abs(drawn(tmp_path / "whole") - drawn(tmp_path / "single")).max() <= 1


def test_a_students_own_constants_come_first_and_a_flag_over_them(tmp_path):
    student = Path(shutil.copytree(DIGITS / "teacher", tmp_path / "student"))
    (student / "sampler.json").write_text('{"name": "dmd2", "timesteps": [999, 499], "guidance": 0.0}')
    own = evaluate.evaluate(student, "digits", tmp_path / "own", limit=2)
    assert own["protocol"] == "digits[images=2]"
    assert own["sampling"]["timesteps"] == [999, 499] and own["sampling"]["guidance"] == 0
    same = evaluate.evaluate(student, "digits", tmp_path / "own", limit=2, steps=2)
    assert same["protocol"] == "digits[images=2]" and same["pictures_made"] == 0
    other = evaluate.evaluate(student, "digits", tmp_path / "other", limit=2, steps=1, guidance=2)
    assert other["protocol"] == "digits[steps=1,guidance=2,images=2]"
    (student / "sampler.json").write_text('{"name": "dmd2", "timesteps": "all", "guidance": 0.0}')
    with pytest.raises(UserError, match="sampler.json: invalid timesteps"):
        evaluate.evaluate(student, "digits", tmp_path / "broken", limit=2)


def test_sdxl_and_models_without_constants_are_run_as_the_protocol_says(sdxl, tmp_path):
    result = evaluate.evaluate(sdxl, "digits", tmp_path / "out", limit=2, steps=2)
    assert result["sampling"]["sampler"] == "dpmpp_2m" and result["sampling"]["guidance"] == 3
    assert len(np.unique(drawn(tmp_path / "out"))) > 2


def test_other_weights_in_the_same_folder_are_another_model(made, tmp_path):
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(DIGITS / "teacher", tmp_path / "model"))
    before = generators.open_model(model).digest
    (model / "README.md").write_text("other words")
    assert generators.open_model(model).digest == before
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    name = next(iter(state))
    save_file(state | {name: state[name] * 1.01}, path, metadata={"format": "pt"})
    changed = generators.open_model(model).digest
    assert changed != before
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "epsilon"))
    assert generators.open_model(model).digest not in (before, changed)


def test_a_nan_is_an_error_and_never_a_black_image():
    with pytest.raises(UserError, match="NaN"):
        generators.rounded(np.full((1, 2, 2, 3), np.nan, np.float32))
    assert generators.rounded(np.array([-0.1, 0, 0.5, 1, 1.2])).tolist() == [0, 0, 128, 255, 255]


# ---------------------------------------------------------------------------------------- captions and real images


def test_a_protocol_of_captions_is_measured_against_real_images(coco, real, sd15, tmp_path):
    out = tmp_path / "out"
    result = evaluate.evaluate(sd15, coco.id, out, **real)
    assert result["protocol"] == coco.id and (out / "result.json").is_file()
    files = sorted((out / "pictures").iterdir())
    assert [path.name for path in files] == [f"{index:05d}.jpg" for index in range(4)]
    wanted = metrics.measure(coco.metrics[0], files, [], sorted(real["reference"].iterdir()), "cpu")
    assert result["figures"] == [{"name": "FID", "protocol": coco.id} | wanted]
    assert result["reference"]["images"] == 3


def test_pndm_is_diffusers_own_pipeline_from_the_images_own_seed(coco, real, sd15, tmp_path):
    from diffusers import StableDiffusionPipeline

    evaluate.evaluate(sd15, coco.id, tmp_path / "out", **real, limit=2)
    pipeline = StableDiffusionPipeline.from_pretrained(sd15)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler).__name__ == "PNDMScheduler"
    image = pipeline(
        "the dog, sitting",
        num_inference_steps=2,
        guidance_scale=7.5,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(5 + 1),
    ).images[0]
    image.save(tmp_path / "wanted.jpg")
    wanted = np.asarray(Image.open(tmp_path / "wanted.jpg")).astype(int)
    assert np.abs(drawn(tmp_path / "out")[1] - wanted).mean() < 0.5


def test_fewer_real_images_and_another_dtype_are_a_part_of_the_name(coco, real, sd15, tmp_path):
    (real["reference"] / "2.jpg").unlink()
    result = evaluate.evaluate(sd15, coco.id, tmp_path / "out", **real, options={"dtype": "bf16"}, limit=2)
    assert result["protocol"] == f"{coco.id}[dtype=bf16,images=2,reference=2]"


def test_a_bundles_precision_is_a_part_of_the_name_where_the_protocol_fixes_one(coco, real, sd15_bundle, tmp_path):
    fixed = dataclasses.replace(coco, dtype="fp16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocols, "PROTOCOLS", {coco.id: fixed})
        result = evaluate.evaluate(sd15_bundle, coco.id, tmp_path / "out", **real, limit=2, engine="onnxruntime")
    assert result["sampling"]["sampler"] == "pndm"
    assert result["protocol"] == f"{coco.id}[dtype=fp32,images=2]"


def test_real_images_statistics_are_taken_where_the_protocol_takes_them(tmp_path):
    path = tmp_path / "real.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    mean, covariance = evaluate._reference(protocols.BK_SDM_COCO30K, path)
    assert mean.shape == (2048,) and covariance.shape == (2048, 2048)
    with pytest.raises(UserError, match="not their statistics"):
        evaluate._reference(protocols.DMD2_SD15_COCO30K, path)
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(UserError, match="2,048"):
        evaluate._reference(protocols.BK_SDM_COCO30K, path)
    np.savez(path, mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(2))
    with pytest.raises(UserError, match="no statistics"):
        evaluate._reference(protocols.BK_SDM_COCO30K, path)


# -------------------------------------------------------------------------------------------------------- command line


def test_the_table_shows_every_figure_with_its_whole_protocol_id(made, capsys):
    assert main(["evaluate", "digits", "--steps", "2", "--limit", "6", "--out", str(made[0])]) == 0
    out = capsys.readouterr().out
    for line in ("prompt accuracy", "Frechet distance"):
        row = next(row for row in out.splitlines() if line in row and "│" in row)
        assert "digits[steps=2,images=6]" in row
    assert "floor" in out and "guidance 3" in out


def test_json_is_the_result(made, capsys):
    assert main(["evaluate", "digits", "--steps", "2", "--limit", "6", "--out", str(made[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"] == made[1]["figures"]


def test_another_rank_says_that_its_images_are_there(made, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", "digits", "--steps", "2", "--limit", "6", "--out", str(made[0])]) == 0
    assert "rank 1 of 2" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_have_the_figures_of_one(tmp_path):
    """`--multi_gpu` is what makes accelerate start several processes; on a machine without a GPU they use its cores."""
    evaluation = ["-m", "accel", "evaluate", "digits/4step", "--images", "6", "--batch", "1", "--json", "--out"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--main_process_port", "0"]
    two = [sys.executable, *launch, "--num_processes", "2", *evaluation, str(tmp_path / "two")]
    one = [sys.executable, *evaluation, str(tmp_path / "one")]
    for command in (two, one):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / name / "result-6-images.json").read_text()) for name in ("one", "two")]
    assert results[0]["figures"] == results[1]["figures"] and results[1]["pictures_made"] == 3
    for i in range(6):
        assert len({(tmp_path / name / f"pictures/{i:05d}.png").read_bytes() for name in ("one", "two")}) == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--protocol", "coco"], ["coco", "bk-sdm-coco30k"]),
        (["--limit", "1"], ["invalid limit: 1", "500"]),
        (["--limit", "501"], ["501", "500"]),
        (["--steps", "0"], ["steps"]),
        (["--guidance", "nan"], ["guidance"]),
        (["--sampler", "plms"], ["plms"]),
        (["--batch", "0"], ["batch"]),
        (["--engine", "openvino"], ["accel export"]),
        (["--threads", "2"], ["threads"]),
        (["--dtype", "fp8"], ["fp8"]),
        (["--device", "toaster"], ["toaster"]),
        (["--captions", "x.csv"], ["prompts of its own"]),
        (["--reference", "x"], ["real images of its own"]),
        (["--protocol", "bk-sdm-coco30k"], ["30000 captions", "metadata.csv"]),
    ],
)
def test_a_request_that_cannot_be_met_says_why_and_makes_nothing(args, words, tmp_path, capsys):
    assert main(["evaluate", "digits", "--out", str(tmp_path / "out"), *args]) in (1, 2)
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and "\n  fix: " in err and "Traceback" not in err
    assert all(word in err for word in words), err
    assert not list((tmp_path / "out").glob("pictures/*"))


def test_coco_without_libraries_or_real_images_says_what_to_get(tmp_path, capsys, real, monkeypatch):
    command = ["evaluate", "digits", "--protocol", "bk-sdm-coco30k", "--limit", "2"]
    command += ["--captions", str(real["captions"])]
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert 'pip install "accel-diffusion[evaluate]"' in capsys.readouterr().err
    monkeypatch.setattr(metrics, "find_spec", lambda name: object())
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "val2014" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "out"), "--reference", str(tmp_path / "nothing")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
