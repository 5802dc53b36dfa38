"""DreamBooth: prompts that cannot work are refused, class images are drawn once, and the loss is the paper's."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from accel.distill import recipes, settings
from accel.distill.data.encoders import Encoders
from accel.distill.diffusion import losses
from accel.distill.diffusion.denoising import noised, task_terms
from accel.distill.methods import dreambooth
from accel.distill.methods.kd import Denoising
from accel.distill.methods.lora import LowRank
from accel.distill.run import execute
from accel.errors import Notice, UserError
from accel.files import sha256
from accel.models.lora import WEIGHT_NAME
from accel.models.source import open_source

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def sd15(small) -> Path:
    """Prompts, prior and class images do not depend on the topology."""
    return small


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Path:
    """Three images without captions, one of them in a subfolder, and a file that is none."""
    folder = tmp_path_factory.mktemp("subject")
    rng = np.random.default_rng(0)
    (folder / "more").mkdir()
    for name in ("a.png", "b.jpg", "more/c.png"):
        Image.fromarray(rng.integers(0, 255, (72, 64, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def tiny(model: Path | str = "", subject: Path | str = "", **fields) -> settings.DreamBoothRecipe:
    common: dict = dict(
        model=str(model),
        data=str(subject),
        instance_prompt="the q dog",
        class_prompt="the dog",
        resolution=64,
        cache="none",
        steps=3,
        class_images=5,
        class_batch=2,
        sample_steps=2,
        rank=4,
        alpha=4.0,
        checkpoint_every=2,
        sample_every=0,
        log="none",
        seed=7,
    )
    return recipes.changed(settings.DreamBoothRecipe(), **common | fields)


# ----------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture
def tokenizers(sdxl) -> list:
    return [tokenizer for tokenizer, _ in Encoders(open_source(sdxl)).text]


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"instance_prompt": "  "}, "instance prompt is empty"),
        ({"class_prompt": ""}, "class prompt is empty"),
        ({"instance_prompt": "The  dog "}, "are the same"),
        ({"instance_prompt": "the " * 60 + "cat q" + " dog" * 20}, r"these words fall off: dog( dog){6}\n"),
        ({"class_prompt": "the " * 74 + "cat dog"}, "class prompt is longer than the 77 tokens .* fall off: dog\n"),
    ],
)
def test_prompts_that_cannot_work(tokenizers, fields, text):
    with pytest.raises(UserError, match=text) as caught:
        dreambooth.check_prompts(tiny(**fields), tokenizers)
    assert "-prompt" in caught.value.fix


def test_a_prompt_of_just_77_tokens_is_whole(tokenizers):
    prompt = "the " * 74 + "cat"
    assert len(tokenizers[0](prompt).input_ids) == 77 and not dreambooth.words_beyond(tokenizers[0], prompt)
    assert dreambooth.words_beyond(tokenizers[0], prompt + " dog the") == ["dog", "the"]
    assert dreambooth.words_beyond(tokenizers[0], "x" * 100) == ["x" * 100]


def test_without_a_class_no_class_prompt_is_needed(tokenizers):
    dreambooth.check_prompts(tiny(class_prompt="", prior_weight=0.0), tokenizers)


def test_a_rare_word_of_many_tokens_is_noticed(tokenizers):
    with pytest.warns(Notice, match=r"'zwx' becomes 3 tokens \(z, w, x\)"):
        dreambooth.check_prompts(tiny(instance_prompt="the zwx dog"), tokenizers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dreambooth.check_prompts(tiny(), tokenizers)


def test_the_learning_rate_follows_the_rank_unless_it_is_given(sd15):
    encoders = Encoders(open_source(sd15))
    rates = [
        dreambooth.completed(tiny(**fields), encoders).learning_rate
        for fields in ({}, {"rank": 0}, {"rank": 0, "learning_rate": 3e-5})
    ]
    assert rates == [1e-4, 1e-6, 3e-5]
    assert dreambooth.completed(tiny(), encoders).sample_prompts == "the q dog|the dog"


@pytest.mark.parametrize("fields", [{"class_images": 0}, {"rank": -1}])
def test_numbers_that_are_none(sd15, fields):
    with pytest.raises(UserError):
        dreambooth.completed(tiny(**fields), Encoders(open_source(sd15)))


def test_a_negative_prior_weight_is_refused():
    with pytest.raises(UserError, match="invalid prior_weight: -1.0"):
        settings.check(tiny(prior_weight=-1.0))


# -------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_instance_plus_weighted_prior(sd15):
    """Equation 2: each half is a mean of its own, whatever the halves' sizes."""
    method = Denoising(tiny(sd15, rank=0, prior_weight=0.3, snr_gamma=5.0), Encoders(open_source(sd15)))
    generator = torch.Generator().manual_seed(0)
    rows = {
        "latent_mean": torch.randn(3, 4, 16, 16, generator=generator),
        "latent_std": torch.ones(3, 4, 16, 16),
        "context": torch.randn(3, 77, 32, generator=generator),
    }
    one = {"index": [0], **{key: value[:1] for key, value in rows.items()}}
    other = {"index": [dreambooth.PRIOR, dreambooth.PRIOR + 1], **{key: value[1:] for key, value in rows.items()}}
    with torch.no_grad():
        total, terms = method.loss(method.phases[0], dreambooth.joined(one, other), 0)
        alone = [method.loss(method.phases[0], batch, 0)[0] for batch in (one, other)]
    torch.testing.assert_close(terms["task"], alone[0])
    torch.testing.assert_close(terms["prior"], alone[1])
    torch.testing.assert_close(total, alone[0] + 0.3 * alone[1])


def test_without_class_rows_there_is_no_prior_term(sd15):
    schedule = Denoising(tiny(sd15, rank=0), Encoders(open_source(sd15))).schedule
    batch = {"index": [0, 1], "latent_mean": torch.zeros(2, 4, 16, 16), "latent_std": torch.ones(2, 4, 16, 16)}
    made = noised(batch, tiny(), schedule)
    out = torch.zeros_like(made.x_t)
    assert task_terms(out, made, batch) == {"task": losses.task_loss(out, made.wanted)}


def test_rank_zero_trains_everything_else_a_lora(sd15):
    kinds = [type(dreambooth.method(tiny(sd15, rank=rank), Encoders(open_source(sd15)))) for rank in (0, 4)]
    assert kinds == [Denoising, LowRank]


# ---------------------------------------------------------------------------------------------------- class images


class OneProcess:
    is_main_process, process_index, num_processes = True, 0, 1

    def wait_for_everyone(self):
        pass

    def autocast(self):
        import contextlib

        return contextlib.nullcontext()


class Half(OneProcess):
    """The second of two processes."""

    is_main_process, process_index, num_processes = False, 1, 2


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.glob("*.png"))}


def test_class_images_are_drawn_once_and_what_is_missing_is_drawn_again(sd15, tmp_path):
    encoders, said = Encoders(open_source(sd15)), []
    folder = dreambooth.class_images(tiny(sd15), encoders, tmp_path, OneProcess(), said.append)
    whole = digests(folder)
    assert list(whole) == [f"{number:06d}.png" for number in range(5)] and len(set(whole.values())) == 5
    assert Image.open(folder / "000000.png").size == (64, 64)
    assert not list(folder.glob(".*"))
    kept, lost = (folder / "000000.png").stat().st_mtime_ns, np.asarray(Image.open(folder / "000003.png"), int)
    (folder / "000003.png").unlink()
    dreambooth.class_images(tiny(sd15), encoders, tmp_path, OneProcess(), said.append)
    again = digests(folder)
    assert "4 of 5" in said[-1] and again | {"000003.png": whole["000003.png"]} == whole
    # Alone in its batch it may be rounded otherwise, as on processors with AMX.
    assert np.abs(np.asarray(Image.open(folder / "000003.png"), int) - lost).max() <= 1
    count = len(said)
    dreambooth.class_images(tiny(sd15), encoders, tmp_path, OneProcess(), said.append)
    assert len(said) == count and (folder / "000000.png").stat().st_mtime_ns == kept


def test_two_processes_draw_a_half_each(sd15, tmp_path):
    encoders = Encoders(open_source(sd15))
    folder = dreambooth.class_images(tiny(sd15), encoders, tmp_path, Half(), print)
    assert list(digests(folder)) == ["000001.png", "000003.png"]


def test_images_drawn_with_other_settings_are_not_mixed_in(sd15, tmp_path):
    encoders = Encoders(open_source(sd15))
    folder = dreambooth.class_images(tiny(sd15, class_images=1), encoders, tmp_path, OneProcess(), print)
    before = digests(folder)
    with pytest.raises(UserError, match="generated with another prompt"):
        dreambooth.class_images(tiny(sd15, class_prompt="the cat"), encoders, tmp_path, OneProcess(), print)
    assert digests(folder) == before


def test_a_class_folder_that_is_given_is_used_as_it_is(sd15, subject, tmp_path):
    recipe = tiny(sd15, class_data=str(subject))
    assert dreambooth.class_images(recipe, None, tmp_path, OneProcess(), print) == subject
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------- the folder


def test_images_need_no_captions(subject):
    images = dreambooth.open_images(subject, "a  photo of\nsks dog")
    assert images.names == ("a.png", "b.jpg", "more/c.png")
    assert {images[row].captions for row in range(3)} == {("a photo of sks dog",)}
    assert images.identity != dreambooth.open_images(subject, "a photo").identity


def test_a_folder_without_images(tmp_path):
    with pytest.raises(UserError, match="no images"):
        dreambooth.open_images(tmp_path, "x")
    with pytest.raises(UserError, match="no such folder"):
        dreambooth.open_images(tmp_path / "nothing", "x", "--class-data")


# ------------------------------------------------------------------------------------------------------- whole runs


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out.with_name("out-run") / "losses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model, fields", [("sd15", {"cache": "auto"}), ("sdxl", {"text_encoder": True})])
def test_a_lora_of_a_subject(model, fields, subject, request, tmp_path):
    out = tmp_path / "out"
    assert not execute(tiny(request.getfixturevalue(model), subject, **fields), out).stopped
    parts = {key.split(".")[0] for key in load_file(out / WEIGHT_NAME)}
    assert parts == ({"unet"} if model == "sd15" else {"unet", "text_encoder", "text_encoder_2"})
    for row in rows(out):
        assert row["loss"] == pytest.approx(row["task"] + row["prior"], rel=1e-5)
    record = json.loads((out / "training.json").read_text())
    assert record["method"] == "DreamBooth" and record["recipe"]["learning_rate"] == 1e-4


def test_all_weights_and_the_text_encoder_learn(sd15, subject, tmp_path):
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "out"
    recipe = tiny(sd15, subject, rank=0, text_encoder=True, learning_rate=1e-3, prior_weight=0.0)
    assert not execute(recipe, out).stopped
    assert "prior" not in rows(out)[0] and not (tmp_path / "out-run" / "class").exists()
    pipe, base = (StableDiffusionPipeline.from_pretrained(folder) for folder in (out, sd15))
    for name, same in (("unet", False), ("text_encoder", False), ("vae", True)):
        ours, theirs = (getattr(pipeline, name).state_dict() for pipeline in (pipe, base))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours) == same, name


def test_the_subject_and_the_class_share_no_noise(sd15, subject, tmp_path):
    """Indices of the two halves differ, so that timesteps, noise and crops are drawn apart."""

    class Accelerator(OneProcess):
        device = torch.device("cpu")

    recipe = tiny(sd15, subject, class_data=str(subject), batch=2)
    encoders = Encoders(open_source(sd15))
    batches = dreambooth.batches_of(recipe, encoders, tmp_path, Accelerator(), lambda text: None)
    first = batches(0)
    made = [next(first) for _ in range(3)]
    later = batches(2)
    assert next(later)["index"] == made[2]["index"]
    for batch in made:
        assert batch["prior"].tolist() == [False, False, True, True] and len(set(batch["index"])) == 4
        assert batch["caption"] == ["the q dog"] * 2 + ["the dog"] * 2 and batch["pixels"].shape == (4, 3, 64, 64)
    first.close(), later.close()


def test_a_bad_prompt_costs_no_time_and_no_file(sd15, subject, tmp_path, capsys):
    from accel.cli import main

    given = ["--model", str(sd15), "--data", str(subject), "--out", str(tmp_path / "out"), "--resolution", "64"]
    assert main(["distill", "dreambooth", *given, "--instance-prompt", "the dog", "--class-prompt", "the dog"]) == 1
    assert "are the same" in capsys.readouterr().err and not list(tmp_path.glob("**/*.png"))
