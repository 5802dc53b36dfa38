"""What a run trains on: filters, mixtures, buckets, prompts; refused, or honoured to the last row."""

from __future__ import annotations

import json
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from accel.distill import settings
from accel.distill.data import batches, survey
from accel.distill.data.encoders import Encoders
from accel.distill.data.selection import check, select
from accel.distill.sources.mixture import parts_of
from accel.distill.sources.open_data import open_data
from accel.errors import UserError
from accel.models.source import open_source

ONE = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, device=torch.device("cpu"))
SIZES = [(64, 64), (128, 64), (64, 128), (40, 90), (130, 60), (70, 66)]


def write_folder(folder, count=24, scores=True):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in range(count):
        size = SIZES[row % len(SIZES)]
        values = np.random.default_rng(row).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(values).save(folder / f"{row:03}.png")
        line = {"file_name": f"{row:03}.png", "text": f"{folder.name} {row}"}
        lines.append(line | ({"aesthetic": 5 + row / 8} if scores and row != 3 else {}))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "photos")


def recipe(data, **fields):
    common = dict(model="x", data=str(data), resolution=64, batch=4, seed=2, cache="none", random_flip=False)
    return settings.FinetuneRecipe(**common | fields)


def selected(made, run, said=None):
    return select(made, False, run, ONE, (said if said is not None else []).append)


def test_a_score_and_a_size_leave_out_what_is_below(photos, tmp_path):
    said = []
    made = selected(recipe(photos, score_column="aesthetic", min_score=7.0, min_size=60), tmp_path, said)
    left = [row for row in range(24) if row >= 16 and min(SIZES[row % 6]) >= 60]
    assert [made.source.captions(at)[0] for at in range(len(made.source))] == [f"photos {row}" for row in left]
    assert "6 of 24 images are left; 15 have a aesthetic below 7" not in said[0]
    assert f"{len(left)} of 24 images are left" in said[0] and "1 have no number in aesthetic" in said[0]
    assert "are smaller than 60 px" in said[0]


def test_a_filter_that_leaves_nothing_or_looks_for_nothing_is_refused(photos, tmp_path):
    with pytest.raises(UserError, match="no image of .*photos is left"):
        selected(recipe(photos, min_size=500), tmp_path)
    with pytest.raises(UserError, match="no image of .*photos has a number in the column 'beauty'"):
        selected(recipe(photos, score_column="beauty"), tmp_path)


def test_another_choice_of_rows_is_another_data_set(photos, tmp_path):
    plain, some = (
        selected(recipe(photos, score_column=column, min_score=6.0 * bool(column)), tmp_path).source.identity
        for column in ("", "aesthetic")
    )
    assert plain == open_data(photos).identity != some


def test_a_survey_is_made_once_and_by_all_processes(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "ROWS", 5)
    source = open_data(photos)
    monkeypatch.setattr(survey, "PATIENCE", 0.0)
    with pytest.raises(UserError, match="3 files are missing"):
        survey.survey(source, tmp_path, column="aesthetic", rank=1, world=2)
    found = survey.survey(source, tmp_path, column="aesthetic", rank=0, world=2)
    assert found.sizes.tolist() == [list(map(float, SIZES[row % 6])) for row in range(24)]
    assert np.isnan(found.score[3]) and found.score[5] == 5 + 5 / 8
    monkeypatch.setattr(survey, "_look", None)  # nothing is read again
    again = survey.survey(source, tmp_path, column="aesthetic")
    np.testing.assert_array_equal(again.score, found.score)


@pytest.mark.parametrize("data", ["a=", "a=0 | b", "a=-1|b", "a=x|b", " | b"])
def test_weights_that_are_none_are_refused(data):
    with pytest.raises(UserError, match="no weight above 0|a name is missing"):
        parts_of(data + " |c" if "|" not in data else data)


def test_shares_add_up_and_a_name_alone_may_have_any_character():
    assert parts_of("photos=3") == [("photos=3", 1)]
    shares = dict(parts_of("shards/{000..099}.tar=0.7 | art=0.2|mine=1/10"))
    assert (
        shares == {"shards/{000..099}.tar": Fraction(7, 10), "art": Fraction(1, 5), "mine": Fraction(1, 10)}
        and sum(shares.values()) == 1
    )


def stream(made, encoders, run, accelerator=ONE):
    return batches.batches_of(made, encoders, run, accelerator, lambda text: None)


def first(stream, count, step=0):
    iterator = stream(step)
    return [next(iterator) for _ in range(count)]


@pytest.fixture(scope="module")
def encoders(sdxl):
    return Encoders(open_source(sdxl))


def test_two_data_sets_by_weight(photos, encoders, tmp_path):
    art = write_folder(tmp_path / "art", 6, scores=False)
    made = stream(recipe(f"{photos}=3 | {art}=1", caption_dropout=0.0), encoders, tmp_path / "run")
    captions = [text for batch in first(made, 50) for text in batch["caption"]]
    assert made.images == 30 and sum(text.startswith("art") for text in captions) in range(45, 56)


def test_a_batch_is_of_one_bucket_and_sdxl_is_told_the_true_sizes(photos, encoders, tmp_path):
    asked = recipe(photos, buckets=True, bucket_step=16, bucket_least=2, random_flip=True, center_crop=False)
    made = stream(asked, encoders, tmp_path)
    names, shapes = set(), set()
    for batch in first(made, 30):
        assert batch["pixels"].shape[0] == 4
        height, width = batch["pixels"].shape[2:]
        shapes.add((width, height))
        for name, ids in zip(batch["name"], batch["time_ids"].tolist(), strict=True):
            names.add(name)
            original = SIZES[int(name[:3]) % 6]
            assert ids[:2] == [original[1], original[0]] and ids[4:] == [height, width]
    assert names == {f"{row:03}.png" for row in range(24)}
    assert shapes == {(64, 64), (80, 48), (48, 80)} or len(shapes) > 2


@pytest.mark.parametrize("buckets", [False, True])
def test_any_division_of_a_step_and_any_start_gives_the_same_examples(photos, encoders, tmp_path, buckets):
    art = write_folder(tmp_path / "art", 9, scores=False)
    how = dict(data=f"{photos} | {art}=2", buckets=buckets, bucket_step=16, bucket_least=2, validation=4)

    def names(start, **fields):
        processes = fields.pop("processes", 1)
        found = []
        for rank in range(processes):
            accelerator = SimpleNamespace(**vars(ONE) | dict(process_index=rank, num_processes=processes))
            made = stream(recipe(**how | fields), encoders, tmp_path / "run", accelerator)
            count = recipe(**how | fields).accumulation
            found.append(first(made, 6 * count, start))
        per_step = [[] for _ in range(6)]
        for mine in found:
            for number, batch in enumerate(mine):
                per_step[number // (len(mine) // 6)] += list(zip(batch["index"], batch["name"], strict=True))
        return [sorted(step) for step in per_step]

    whole = names(10, batch=8)
    assert names(10, batch=2, accumulation=4) == whole
    assert names(10, batch=4, processes=2) == whole
    assert names(13, batch=8)[:3] == whole[3:]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_with_buckets_training_sees_the_same_with_and_without_the_cache(request, photos, family, tmp_path):
    encoders = Encoders(open_source(request.getfixturevalue(family)))
    how = dict(buckets=True, bucket_step=16, bucket_least=2, random_flip=True, validation=3, cache_variants=8)
    how |= dict(cache_dtype="float32", caption_dropout=0.2)
    plain = stream(recipe(photos, **how), encoders, tmp_path)
    cached = stream(recipe(photos, **how | dict(cache="auto")), encoders, tmp_path)
    for one, two in zip(first(plain, 12), first(cached, 12), strict=True):
        assert one["name"] == two["name"] and one["caption"] == two["caption"]
        wanted = encoders.images(one["pixels"]) | encoders.prompts(one["caption"])
        wanted |= {"time_ids": one["time_ids"]} if family == "sdxl" else {}
        for name, value in wanted.items():
            torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="buckets"):
        stream(recipe(photos, **how | dict(cache="auto", buckets=False)), encoders, tmp_path)


def test_an_image_without_a_size_is_named_and_has_no_bucket(tmp_path, encoders):
    folder = write_folder(tmp_path / "data")
    (folder / "005.png").write_bytes(b"no image")
    asked = recipe(folder, buckets=True, bucket_step=16, bucket_least=2)
    names = {name for batch in first(stream(asked, encoders, tmp_path / "run"), 40) for name in batch["name"]}
    assert names == {f"{row:03}.png" for row in range(24) if row != 5}
    assert "005.png" in (tmp_path / "run/skipped.jsonl").read_text()


def test_prompts_alone_make_batches_without_images(encoders, tmp_path):
    (tmp_path / "prompts.txt").write_text("a  cat\n\na dog\nthe fox\n")
    asked = settings.DMD2Recipe(
        model="x", data=str(tmp_path / "prompts.txt"), resolution=64, batch=3, accumulation=2, adversarial_weight=0.0
    )
    check(asked)
    made = stream(asked, encoders, tmp_path)
    epoch = first(made, 2)
    assert sorted(epoch[0]["caption"]) == ["a cat", "a dog", "the fox"] and made.images == 3
    assert epoch[0]["index"] == [0, 1, 2] and epoch[1]["index"] == [3, 4, 5]
    assert epoch[0]["latent_mean"].shape == (3, 4, 64 // encoders.factor, 64 // encoders.factor)
    assert epoch[0]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 3
    assert first(made, 1, step=1)[0]["caption"] == first(made, 3)[2]["caption"]


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("Finetune", dict(data="p.txt"), "p.txt has prompts and no images, which Finetune learns from"),
        ("DMD2", dict(data="p.txt"), "p.txt has prompts and no images, which DMD2"),
        ("DMD2", dict(data="p.txt", adversarial_weight=0.0, backward_simulation=False), "has prompts and no images"),
        ("DMD2", dict(data="p.txt", adversarial_weight=0.0, min_size=9), "--min-size says nothing about them"),
        ("DMD2", dict(data="p.txt | a", adversarial_weight=0.0), "cannot be mixed"),
        ("DMD2", dict(data="a", buckets=True), "the images of DMD2 have one size"),
        ("DMD2", dict(data="a", validation=8), "DMD2 has no loss that says on held-out images"),
        ("Regression", dict(data="a", score_column="x"), "Regression takes the images of one data set as they are"),
        ("DreamBooth", dict(data="a | b"), "DreamBooth takes the images of one data set"),
        ("DreamBooth", dict(data="teacher:p.txt"), "DreamBooth does not learn from images that a teacher draws"),
        ("Finetune", dict(data="a", min_score=7.5), "--min-score without a column"),
        ("Finetune", dict(data="a", data_images=9), "--data-images is for images that a teacher draws"),
        ("Finetune", dict(data="a", data_model="m"), "--data-model is for images that a teacher draws"),
    ],
)
def test_what_a_method_cannot_learn_from_is_refused_before_anything_is_read(kind, fields, message):
    with pytest.raises(UserError, match=message):
        check(getattr(settings, f"{kind}Recipe")(model="x", **fields))


@pytest.mark.parametrize("kind", ["Regression", "DMD2"])
def test_what_needs_no_images_takes_prompts(kind):
    fields = dict(adversarial_weight=0.0) if kind == "DMD2" else {}
    check(getattr(settings, f"{kind}Recipe")(model="x", data="p.txt", **fields))


def test_every_kind_of_data_knows_sizes_and_values(tmp_path):
    """A folder, shards, a data set and digits say the same as Pillow, EXIF's turns included."""
    import tarfile

    datasets = pytest.importorskip("datasets")
    folder = write_folder(tmp_path / "folder", 6)
    turned = Image.open(folder / "001.png")
    exif = turned.getexif()
    exif[274] = 6
    turned.save(folder / "001.png", exif=exif)
    sizes = [*SIZES[:1], (64, 128), *SIZES[2:]]
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for line in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines()):
            name = line["file_name"]
            tar.add(folder / name, name)
            (tmp_path / "j.json").write_text(json.dumps({"caption": line["text"], "aesthetic": line.get("aesthetic")}))
            tar.add(tmp_path / "j.json", name.replace(".png", ".json"))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    table = {"image": [str(folder / row["file_name"]) for row in rows], "text": [row["text"] for row in rows]}
    table["aesthetic"] = [row.get("aesthetic") for row in rows]
    datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    for place in ("folder", "one.tar", "saved"):
        source = open_data(tmp_path / place)
        assert [source.size(row) for row in range(6)] == sizes, place
        assert [source.size(row) for row in range(6)] == [source[row].image.size for row in range(6)]
        assert [source.value(row, "aesthetic") for row in range(6)] == [5, 5.125, 5.25, None, 5.5, 5.625], place
        assert source.value(0, "beauty") is None
    digits = open_data("digits")
    assert digits.size(3) == digits[3].image.size and digits.value(3, "digit") == digits.labels[3]
