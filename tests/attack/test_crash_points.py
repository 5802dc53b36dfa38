"""Killed, or refused by the disk, at any event of the file system: what is read afterwards is the old or the new one.

Each case is a process of its own (a fork) that writes something small, and dies or fails at the k-th event, for every k
until it comes through. Then a reader looks, and a second writer that is left in peace must end with nothing left over.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from accel import files
from accel.bundle import Bundle, finalize
from accel.errors import UserError

# Events of Python's audit hooks (PEP 578) that change a disk, or come right before it.
EVENTS = ("open", "os.", "shutil.", "tempfile.", "ctypes.dlsym", "ctypes.dlopen")
COUNTS: dict[str, int] = {}
_now: list = []  # [events left, what happens then]


def _hook(event: str, arguments: tuple) -> None:
    if not _now or not event.startswith(EVENTS):
        return
    _now[0] -= 1
    if _now[0] == 0:
        if _now[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, "No space left on device")


sys.addaudithook(_hook)


def crashes(work, k: int, how: str) -> bool:
    """Run `work` in a fork that is hit at its k-th event; whether it was hit before it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stderr = sys.stdout = open(os.devnull, "w")
            _now[:] = [k, how]
            work()
            code = 0 if _now[0] > 0 else 1
        finally:
            _now.clear()
            os._exit(code)
    until = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"hangs at event {k}")
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(ended[1]) != 0


@pytest.fixture(params=[7, pytest.param(1, marks=pytest.mark.attack)], ids=["every seventh point", "every point"])
def every_point(request):
    return partial(_every_point, request.param)


def _every_point(step: int, name: str, fresh, work, check, how: str) -> None:
    """Hit `work` at its events in a fresh folder; `check(folder, whether it was hit)` after each."""
    for k in range(1, 2000, step):
        folder = fresh(k)
        hit = crashes(lambda folder=folder: work(folder), k, how)
        check(folder, hit)
        if not hit:
            COUNTS[f"{name}, {how}"] = (k - 1) // step
            assert k > 10, "the hook sees nothing"
            return
    pytest.fail("it never comes through")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE", 0.0)


SMALL = Bundle.open("digits/tiny-1step-int8")


def write(out: Path, text: str, overwrite: bool) -> None:
    """The final part of an export: copy, write, list, replace."""
    with files.new_folder(out, overwrite=overwrite) as folder:
        SMALL.copy(folder, "scheduler")
        (folder / "weights").write_text(text)
        finalize(folder, replace(SMALL.manifest, components={}))


def content(out: Path) -> str:
    bundle = Bundle.open(out)
    bundle.verify()
    return (out / "weights").read_text()


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_first_export_is_there_as_a_whole_or_not_at_all(every_point, tmp_path, how):
    def check(folder: Path, hit: bool) -> None:
        out = folder / "out"
        if out.exists() or not hit:
            assert content(out) == "new"
        else:
            with pytest.raises(UserError, match="no such folder"):
                Bundle.open(out)
            write(out, "new", False)
        files.settle(out)
        assert sorted(path.name for path in folder.iterdir()) in (["out"], [".out.lock", "out"])

    def fresh(k: int) -> Path:
        (tmp_path / str(k)).mkdir()
        return tmp_path / str(k)

    every_point("export", fresh, lambda folder: write(folder / "out", "new", False), check, how)


@pytest.mark.parametrize("how", ["kill", "fail"])
@pytest.mark.parametrize("exchange", [True, False])
def test_an_overwrite_leaves_the_old_or_the_new_one(every_point, tmp_path, monkeypatch, how, exchange):
    if not exchange:
        monkeypatch.setattr(files.atomic, "exchange", lambda one, other: False)

    def fresh(k: int) -> Path:
        write(tmp_path / str(k) / "out", "old", False)
        return tmp_path / str(k)

    def check(folder: Path, hit: bool) -> None:
        out = folder / "out"
        if exchange:
            assert out.is_dir()  # at every moment, whoever looks and however
        assert content(out) in (("old", "new") if hit else ("new",))
        write(out, "newer", True)
        assert content(out) == "newer" and [path.name for path in folder.iterdir()] == ["out"]

    name = "overwrite" if exchange else "overwrite without exchange"
    every_point(name, fresh, lambda folder: write(folder / "out", "new", True), check, how)


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_file_is_the_old_or_the_new_one(every_point, tmp_path, how):
    def fresh(k: int) -> Path:
        files.write_json(tmp_path / str(k) / "x.json", {"is": "old"})
        return tmp_path / str(k)

    def check(folder: Path, hit: bool) -> None:
        assert files.read_json(folder / "x.json", "x") in ({"is": "old"}, {"is": "new"})[0 if hit else 1 :]
        files.sweep(folder)
        assert [path.name for path in folder.iterdir()] == ["x.json"]

    # A file has few events: it is written three times over, so that the hook has something to see.
    def work(folder: Path) -> None:
        for _ in range(4):
            files.write_json(folder / "x.json", {"is": "new"})

    every_point("file", fresh, work, check, how)


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_checkpoint_is_whole_or_the_one_before_it_counts(every_point, tmp_path, how):
    import torch

    from accel.distill.training import checkpoints

    torch.set_num_threads(1)
    state = _sibling("test_checkpoints").state
    states = {step: state(step) for step in (1, 2)}

    def fresh(k: int) -> Path:
        checkpoints.write(tmp_path / str(k), 1, keep=1, **states[1])
        return tmp_path / str(k)

    def check(run: Path, hit: bool) -> None:
        checkpoints.tidy(run)
        found = checkpoints.all_of(run)
        assert found and checkpoints.read(found[-1], **state()) in ((1, 2) if hit else (2,))
        checkpoints.write(run, 2, keep=1, **states[2])
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]

    work = lambda run: checkpoints.write(run, 2, keep=1, **states[2])  # noqa: E731
    every_point("checkpoint", fresh, work, check, how)


class _Encoders:
    """Stand-ins whose latents and embeddings are numbers, so that only files are at stake."""

    factor, digest, latent_channels = 8, "0" * 64, 4

    def __init__(self):
        import torch

        self.dtype = self.vae_dtype = torch.float32

    def images(self, pixels):
        latents = pixels[:, :1, ::8, ::8].repeat(1, 4, 1, 1)
        return {"latent_mean": latents, "latent_std": latents}

    def prompts(self, texts):
        import torch

        return {"context": torch.tensor([[[float(len(text))]] for text in texts])}


class _Images:
    identity = "1" * 64

    def __len__(self):
        return 3

    def __getitem__(self, row):
        from PIL import Image

        from accel.distill.sources.item import Item

        return Item(Image.fromarray(np.full((16, 16, 3), 40 * row, np.uint8)), self.captions(row), str(row))

    def captions(self, row):
        return (f"image {row}",)


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_cache_is_finished_by_the_next_run_with_the_same_bytes(every_point, tmp_path, how):
    import torch

    from accel.distill.data import make_cache

    torch.set_num_threads(1)
    options = dict(resolution=16, center_crop=True, random_flip=False, seed=1, dtype="float32", shard=2)

    def build(folder: Path):
        return make_cache.build(_Images(), _Encoders(), folder, **options)

    build(tmp_path / "whole")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}

    def check(folder: Path, hit: bool) -> None:
        made = build(folder)
        assert made.verify() == [] and {path.name: path.read_bytes() for path in folder.iterdir()} == wanted

    every_point("cache", lambda k: tmp_path / str(k), build, check, how)


def _sibling(name: str):
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def counted():
    yield
    if path := os.environ.get("ACCEL_ATTACK_COUNTS"):
        with open(path, "a") as file:
            file.write(json.dumps({"crash points": COUNTS}) + "\n")
