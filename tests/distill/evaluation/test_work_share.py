"""A folder of images that several processes fill: who makes what, what is kept, what is refused."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from accel.distill.data import distributed
from accel.distill.evaluation import work_share
from accel.distill.evaluation.work_share import (
    IMAGES,
    RUN,
    Shard,
    claim,
    confirm,
    image_file,
    is_whole,
    save,
    shard_of,
    wait_for_images,
)
from accel.errors import UserError

SETTINGS = {"protocol": "digits", "steps": 25, "timesteps": None, "guidance": 3.0}


def image(seed: int = 0, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


@given(st.integers(1, 9), st.integers(0, 60))
def test_every_image_is_made_by_one_process(world, count):
    made = [index for rank in range(world) for index in Shard(rank, world).indices(count)]
    assert sorted(made) == list(range(count))


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, Shard(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Shard(3, 8, 3)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Shard(5, 8, 1)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, Shard(3, 4, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, Shard(1, 2, 0)),
        ({"RANK": "0", "WORLD_SIZE": "2", "PMI_RANK": "7", "PMI_SIZE": "9"}, Shard(0, 2, 0)),
    ],
)
def test_the_launchers_variables_are_read(environment, shard):
    assert shard_of(environment) == shard


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "0"},
        {"RANK": "a", "WORLD_SIZE": "2"},
        {"LOCAL_RANK": ""},
    ],
)
def test_variables_that_do_not_fit_are_refused(environment):
    with pytest.raises(UserError, match="RANK|WORLD_SIZE") as error:
        shard_of(environment)
    assert error.value.fix


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_an_image_is_whole_or_not_there(tmp_path, kind, monkeypatch):
    (tmp_path / IMAGES).mkdir()
    path = image_file(tmp_path, 7, kind)
    assert path.name == {"png": "00007.png", "jpeg": "00007.jpg"}[kind] and not is_whole(path, 16)
    save(image(), path, kind)
    assert is_whole(path, 16) and not is_whole(path, 32)
    if kind == "png":
        assert np.array_equal(np.asarray(Image.open(path)), image())
    before = path.read_bytes()
    path.write_bytes(before[: len(before) * 2 // 3])
    assert not is_whole(path, 16)
    path.write_bytes(before)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save(image(1), path, kind)
    assert path.read_bytes() == before and [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_folder_keeps_its_settings_and_names_what_differs(tmp_path):
    out = tmp_path / "a" / "out"
    claim(out, SETTINGS)
    save(image(), image_file(out, 0, "png"), "png")
    claim(out, dict(SETTINGS))
    before = (out / RUN).read_bytes()
    with pytest.raises(UserError, match=r"steps was 25 and is 4 now; guidance was 3.0 and is 0.0 now") as error:
        claim(out, SETTINGS | {"steps": 4, "guidance": 0.0})
    assert "another --out" in error.value.fix
    with pytest.raises(UserError, match="batch was nothing and is 3 now"):
        claim(out, SETTINGS | {"batch": 3})
    with pytest.raises(UserError, match="guidance was 3.0 and is nothing now"):
        claim(out, {key: value for key, value in SETTINGS.items() if key != "guidance"})
    assert (out / RUN).read_bytes() == before
    assert sorted(entry.name for entry in out.iterdir()) == [IMAGES, RUN]


def test_a_folder_without_images_takes_new_settings_and_the_process_of_the_old_ones_notices(tmp_path):
    claim(tmp_path, SETTINGS)
    claim(tmp_path, SETTINGS | {"steps": 4})
    confirm(tmp_path, SETTINGS | {"steps": 4})
    with pytest.raises(UserError, match="steps was 4 and is 25 now"):
        confirm(tmp_path, SETTINGS)


@pytest.mark.parametrize("name", ["thesis.txt", "pictures/mine.png"])
def test_a_folder_of_somebody_elses_is_left_alone(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="not of an evaluation"):
        claim(tmp_path, SETTINGS)
    assert (tmp_path / name).read_text() == "mine" and not (tmp_path / RUN).exists()


def test_a_path_that_cannot_be_a_folder_and_a_damaged_record_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match="cannot be used"):
            claim(path, SETTINGS)
    claim(tmp_path / "out", SETTINGS)
    save(image(), image_file(tmp_path / "out", 0, "png"), "png")
    for text in ("{", "[]"):
        (tmp_path / "out" / RUN).write_text(text)
        with pytest.raises(UserError, match="damaged|not a JSON object"):
            claim(tmp_path / "out", SETTINGS)


def _claimed(out: Path, steps: int, results) -> None:
    try:
        claim(out, SETTINGS | {"steps": steps})
        results.put(steps)
    except UserError:
        results.put(-steps)


@pytest.mark.own_process
def test_processes_that_start_together_agree_on_the_first_ones_settings(tmp_path):
    context = multiprocessing.get_context("fork")
    for trial in range(3):
        results = context.Queue()
        started = [context.Process(target=_claimed, args=(tmp_path / str(trial), 25, results)) for _ in range(6)]
        for process in started:
            process.start()
        assert [results.get(timeout=60) for _ in started] == [25] * 6
        for process in started:
            process.join()
        assert json.loads((tmp_path / str(trial) / RUN).read_text())["steps"] == 25
        assert sorted(entry.name for entry in (tmp_path / str(trial)).iterdir()) == [IMAGES, RUN]


def test_a_file_system_without_links_will_do(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(work_share.os, "link", unsupported)
    claim(tmp_path / "out", SETTINGS)
    confirm(tmp_path / "out", SETTINGS)


def test_waiting_ends_with_the_last_image_and_is_patient_while_images_come(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "POLL", 0.02)
    claim(tmp_path, SETTINGS)

    def other_process():
        for index in range(5):
            time.sleep(0.15)
            save(image(), image_file(tmp_path, index, "png"), "png")

    thread = threading.Thread(target=other_process)
    thread.start()
    seen = []
    # All five take longer than the patience; each of them does not.
    files = wait_for_images(tmp_path, 5, "png", 2, 0.5, seen.append)
    thread.join()
    assert [path.name for path in files] == [f"{index:05d}.png" for index in range(5)]
    assert seen == sorted(seen) and seen[0] < 5 and seen[-1] == 5


def test_waiting_in_vain_names_the_images_and_whose_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "POLL", 0.02)
    claim(tmp_path, SETTINGS)
    for index in (0, 1, 2, 3, 6):
        save(image(), image_file(tmp_path, index, "png"), "png")
    words = r"3 of 8 images .* 00004.png, 00005.png, 00007.png \(of rank 1, 2\)"
    with pytest.raises(UserError, match=words) as error:
        wait_for_images(tmp_path, 8, "png", 3, 0.1)
    assert "kept" in error.value.fix
