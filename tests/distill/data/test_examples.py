"""Examples by number: the same whoever asks, whatever is broken, wherever one starts."""

from __future__ import annotations

import json
import multiprocessing
import time

import numpy as np
import pytest
import torch
from PIL import Image

from accel.distill.data import rng
from accel.distill.data.examples import FIRST, Examples, collate, loader
from accel.distill.sources.open_data import open_data
from accel.errors import UserError


def write_folder(folder, count, *, broken=(), size=(24, 20), captions=None):
    """Images of random pixels; those in `broken` are cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in range(count):
        values = np.random.default_rng(row).integers(0, 256, (size[1], size[0], 3), np.uint8)
        path = folder / f"{row:04}.png"
        Image.fromarray(values).save(path)
        if row in broken:
            path.write_bytes(path.read_bytes()[:200])
        lines.append(json.dumps({"file_name": path.name, "text": captions or [f"number {row}", f"image {row}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    return open_data(write_folder(tmp_path_factory.mktemp("ten"), 10))


def make(source, **options):
    return Examples(source, **{"seed": 3, "resolution": 16} | options)


def same(one, two) -> bool:
    return set(one) == set(two) and all(
        torch.equal(one[key], two[key]) if isinstance(one[key], torch.Tensor) else one[key] == two[key] for key in one
    )


def test_an_example_is_the_same_whoever_asks(ten):
    one, two = make(ten, size_conditioning=True), make(ten, size_conditioning=True)
    backwards = {index: two[index] for index in reversed(range(25))}
    for index in range(25):
        example = one[index]
        assert same(example, backwards[index])
        assert example["index"] == index
        assert example["pixels"].shape == (3, 16, 16) and example["pixels"].dtype == torch.float32
        assert example["time_ids"].shape == (6,) and example["time_ids"][:2].tolist() == [20, 24]
    assert "time_ids" not in make(ten)[0]


def test_every_epoch_shows_every_image_once_in_another_order(ten):
    names = [make(ten)[index]["name"] for index in range(30)]
    epochs = [names[:10], names[10:20], names[20:]]
    assert all(sorted(epoch) == sorted(set(names)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_placements_and_captions_change_from_epoch_to_epoch(ten):
    examples = make(ten)
    row = [next(i for i in range(10 * e, 10 * e + 10) if examples[i]["name"] == "0004.png") for e in range(12)]
    assert {examples[index]["caption"] for index in row} == {"number 4", "image 4"}
    assert len({examples[index]["pixels"].numpy().tobytes() for index in row}) > 6


def test_captions_are_dropped_at_the_rate_asked_for(ten):
    dropped = make(ten, caption_dropout=0.3)
    kept = make(ten)
    empty = [index for index in range(600) if dropped[index]["caption"] == ""]
    assert 140 < len(empty) < 220  # 180 expected, standard deviation 11
    assert all(kept[index]["caption"] == dropped[index]["caption"] for index in set(range(600)) - set(empty))
    assert all(torch.equal(kept[index]["pixels"], dropped[index]["pixels"]) for index in empty[:5])
    assert {make(ten, caption_dropout=1)[index]["caption"] for index in range(9)} == {""}


def test_a_broken_image_is_replaced_and_named_and_nothing_else_moves(tmp_path):
    whole = make(open_data(write_folder(tmp_path / "whole", 12)))
    told = []
    source = open_data(write_folder(tmp_path / "damaged", 12, broken=(4, 5, 11)))
    damaged = make(source, on_broken=lambda *entry: told.append(entry))
    for index in range(36):
        row, _ = rng.row(index, 12, 3)
        example = damaged[index]
        if row in (4, 5, 11):
            assert example["name"] == {4: "0006.png", 5: "0006.png", 11: "0000.png"}[row]
            passed = {4: [4, 5], 5: [5], 11: [11]}[row]
            assert [entry["row"] for entry in example["replaced"]] == passed
            assert example["pixels"].isfinite().all()
        else:
            assert same(example, whole[index])
    assert sorted(damaged.broken) == ["0004.png", "0005.png", "0011.png"]
    assert "cannot be decoded" in damaged.broken["0004.png"]
    assert told == list(damaged.broken.items())


def test_an_image_too_narrow_to_cut_a_square_from_is_broken(tmp_path):
    folder = write_folder(tmp_path, 3)
    Image.new("RGB", (2000, 3)).save(folder / "0001.png")
    examples = make(open_data(folder))
    assert {examples[index]["name"] for index in range(9)} == {"0000.png", "0002.png"}
    assert examples.broken == {"0001.png": "2000 x 3 pixels is too narrow for a square"}


def test_when_everything_is_broken_there_is_no_training(tmp_path):
    examples = make(open_data(write_folder(tmp_path, 6, broken=range(6))))
    with pytest.raises(UserError, match="all 6 training images cannot be used; 000.*cannot be decoded"):
        examples[0]


def test_when_most_is_broken_it_is_known_early(tmp_path):
    count = 3 * FIRST
    folder = write_folder(tmp_path, count, broken=[row for row in range(count) if row % 8], size=(17, 17))
    examples = make(open_data(folder))
    with pytest.raises(UserError, match=r"51 of the first \d+ training images cannot be used"):
        for index in range(count):
            examples[index]
    # A third is not most of it.
    folder = write_folder(tmp_path / "third", count, broken=range(0, count, 3), size=(17, 17))
    examples = make(open_data(folder))
    for index in range(count):
        examples[index]
    assert len(examples.broken) == FIRST


@pytest.mark.parametrize(
    ("options", "message"), [(dict(caption_dropout=1.5), "1.5 is not a share"), (dict(resolution=0), "0 pixels")]
)
def test_options_out_of_range(ten, options, message):
    with pytest.raises(UserError, match=message):
        make(ten, **options)


# ------------------------------------------------------------------------------------------------------------ loader


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def test_a_batch_stacks_tensors_and_lists_the_rest(ten):
    batch = collate([make(ten, size_conditioning=True)[index] for index in (4, 2, 7)])
    assert batch["pixels"].shape == (3, 3, 16, 16) and batch["time_ids"].shape == (3, 6)
    assert batch["index"] == [4, 2, 7] and len(batch["caption"]) == len(batch["name"]) == 3
    assert batch["replaced"] == []


def test_a_run_can_be_entered_at_any_step(ten):
    options = dict(batch=2, accumulation=3)
    whole = take(loader(make(ten), **options), 12)
    assert [batch["index"] for batch in whole] == [[2 * n, 2 * n + 1] for n in range(12)]
    entered = take(loader(make(ten), step=2, **options), 6)
    assert all(same(one, two) for one, two in zip(whole[6:], entered, strict=True))


def test_two_processes_see_together_what_one_sees(ten):
    one = take(loader(make(ten), batch=4, accumulation=2), 6)
    ranks = [take(loader(make(ten), batch=2, accumulation=2, rank=rank, world=2), 6) for rank in (0, 1)]
    for joint, first, second in zip(one, *ranks, strict=True):
        assert joint["index"] == first["index"] + second["index"]
        assert torch.equal(joint["pixels"], torch.cat([first["pixels"], second["pixels"]]))


@pytest.mark.own_process
def test_workers_change_nothing_report_what_is_broken_and_are_gone_afterwards(tmp_path):
    folder = write_folder(tmp_path, 12, broken=(4, 5))
    told = []
    examples = make(open_data(folder), on_broken=lambda *entry: told.append(entry[0]))
    state = torch.random.get_rng_state()
    iterator = loader(examples, batch=3, workers=2)
    batches = [next(iterator) for _ in range(8)]
    assert len(multiprocessing.active_children()) == 2
    iterator.close()
    assert torch.equal(torch.random.get_rng_state(), state)
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert multiprocessing.active_children() == []
    alone = take(loader(make(open_data(folder)), batch=3), 8)
    assert [batch["index"] for batch in batches] == [batch["index"] for batch in alone]
    assert all(torch.equal(one["pixels"], two["pixels"]) for one, two in zip(batches, alone, strict=True))
    assert sorted(examples.broken) == sorted(told) == ["0004.png", "0005.png"]


@pytest.mark.own_process
@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_worker_is_the_error(tmp_path, workers):
    iterator = loader(make(open_data(write_folder(tmp_path, 4, broken=range(4)))), batch=2, workers=workers)
    with pytest.raises(UserError) as caught:
        next(iterator)
    assert caught.value.message.startswith("all 4 training images cannot be used")
    assert "Traceback" not in str(caught.value) and "mounted" in caught.value.fix
    iterator.close()
    assert multiprocessing.active_children() == []
