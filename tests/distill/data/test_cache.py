"""Latents and texts on disk: what training sees is the same, and no kill, damage or mix-up gets past it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from accel.disk import atomic
from accel.distill.data import make_cache, noted_files
from accel.distill.data.cache import open_cache
from accel.distill.data.encoders import Encoders
from accel.distill.data.examples import Examples, loader
from accel.distill.data.make_cache import build
from accel.distill.sources.open_data import open_data
from accel.errors import Notice, UserError
from accel.files import sha256
from accel.models.source import open_source

ROWS = 11
PLAIN = dict(resolution=32, center_crop=True, random_flip=False, seed=3, shard=4, batch=3)
DRAWN = PLAIN | dict(center_crop=False, random_flip=True, variants=3)


def write_folder(folder, *, broken=()):
    folder.mkdir(parents=True)
    lines = []
    for row in range(ROWS):
        small = np.random.default_rng(row).integers(0, 256, (5, 6, 3), np.uint8)
        path = folder / f"{row:02}.png"
        Image.fromarray(small).resize((50 + row, 40)).save(path)
        if row in broken:
            path.write_bytes(path.read_bytes()[:100])
        lines.append({"file_name": path.name, "text": ["the cat", f"the dog {row}"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_data(write_folder(tmp_path_factory.mktemp("data") / "whole"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return open_data(write_folder(tmp_path_factory.mktemp("data") / "damaged", broken=(1, 6, 7)))


@pytest.fixture(scope="module")
def encoders(sd15):
    return Encoders(open_source(sd15))


@pytest.fixture(scope="module")
def made(data, encoders, tmp_path_factory):
    """A finished cache that tests only read."""
    return build(data, encoders, tmp_path_factory.mktemp("made") / "cache", dtype="float32", **DRAWN)


def digests(folder):
    return {path.name: sha256(path) for path in folder.iterdir()}


def copy(folder, to):
    import shutil

    return shutil.copytree(folder, to)


# ------------------------------------------------------------------------------------------- the same as without it


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("options", [PLAIN, DRAWN], ids=["centre", "drawn"])
def test_training_sees_the_same_with_and_without(request, data, family, options, tmp_path):
    encoders = Encoders(open_source(request.getfixturevalue(family)))
    cache = build(data, encoders, tmp_path / "cache", dtype="float32", **options)
    placement = {name: options[name] for name in ("resolution", "center_crop", "random_flip", "seed")}
    shared = placement | dict(size_conditioning=encoders.sdxl, caption_dropout=0.3)
    plain, cached = Examples(data, **shared), Examples(None, cache=cache, **shared)
    captions = set()
    for index in range(3 * ROWS):  # three epochs: as many as there are variants
        one, two = plain[index], cached[index]
        assert (one["name"], one["caption"]) == (two["name"], two["caption"])
        expected = encoders.images(one["pixels"][None]) | encoders.prompts([one["caption"]])
        expected = {name: value[0] for name, value in expected.items()}
        if encoders.sdxl:
            expected["time_ids"] = one["time_ids"]
        assert {name for name, value in two.items() if isinstance(value, torch.Tensor)} == set(expected)
        for name, value in expected.items():
            assert two[name].dtype == torch.float32
            torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)
        captions.add(one["caption"])
    assert "" in captions and len(captions) > 5


def test_variants_differ_where_something_is_drawn_and_only_there(data, encoders, made, tmp_path):
    assert made.variants == 3
    assert not torch.equal(made.latents(4, 0)["latent_mean"], made.latents(4, 1)["latent_mean"])
    assert build(data, encoders, tmp_path / "one", **PLAIN | dict(variants=3)).variants == 1


def test_half_precision_is_close_and_half_the_size(data, encoders, made, tmp_path):
    half = build(data, encoders, tmp_path / "half", **DRAWN)
    for row in range(ROWS):
        one, two = made.latents(row, 2), half.latents(row, 2)
        assert two["latent_mean"].dtype == torch.float32
        torch.testing.assert_close(one["latent_mean"], two["latent_mean"], atol=1e-3, rtol=1e-3)
        assert torch.equal(one["time_ids"], two["time_ids"])
    tensors = load_file(half.folder / "latents-00000.safetensors")
    assert tensors["latent_mean"].dtype == tensors["latent_std"].dtype == torch.float16
    assert load_file(half.folder / "text-00000.safetensors")["context"].dtype == torch.float16


def test_every_caption_is_kept_once(made):
    texts = [made.caption(number) for number in range(ROWS + 2)]
    assert texts == ["", "the cat", *(f"the dog {row}" for row in range(ROWS))]
    stored = sum(len(load_file(path)["context"]) for path in made.folder.glob("text-*.safetensors"))
    assert stored == len(texts)
    assert made.row(5) == ("05.png", [1, 7])


@pytest.mark.own_process
def test_workers_read_it_too(data, made):
    options = {name: DRAWN[name] for name in ("resolution", "center_crop", "random_flip", "seed")}
    examples = Examples(None, cache=pickle.loads(pickle.dumps(made)), **options)
    examples[0]  # a file is open when the worker is forked
    batches = []
    for workers in (0, 2):
        iterator = loader(examples, batch=4, workers=workers)
        batches.append([next(iterator) for _ in range(4)])
        iterator.close()
    for one, two in zip(*batches, strict=True):
        assert one["index"] == two["index"] and torch.equal(one["latent_mean"], two["latent_mean"])
        assert one["latent_mean"].shape == (4, 4, 8, 8) and one["context"].shape == (4, 77, 32)


def test_broken_rows_are_left_out_named_and_replaced_as_without_cache(damaged, encoders, tmp_path):
    cache = build(damaged, encoders, tmp_path / "cache", dtype="float32", **DRAWN)
    assert sorted(cache.broken) == ["01.png", "06.png", "07.png"]
    assert "cannot be decoded" in cache.broken["06.png"]
    assert json.loads((tmp_path / "cache/index.json").read_text())["broken"] == cache.broken
    options = {name: DRAWN[name] for name in ("resolution", "center_crop", "random_flip", "seed")}
    plain, cached = Examples(damaged, **options), Examples(None, cache=cache, **options)
    for index in range(2 * ROWS):
        one, two = plain[index], cached[index]
        assert (one["name"], one["caption"], one["replaced"]) == (two["name"], two["caption"], two["replaced"])
        torch.testing.assert_close(
            encoders.images(one["pixels"][None])["latent_mean"][0], two["latent_mean"], atol=1e-5, rtol=1e-4
        )
    assert plain.broken == cached.broken == cache.broken


def test_when_all_is_broken_there_is_no_cache(encoders, tmp_path):
    source = open_data(write_folder(tmp_path / "data", broken=range(ROWS)))
    with pytest.raises(UserError, match="all 11 training images cannot be used; 00.png"):
        build(source, encoders, tmp_path / "cache", **PLAIN)
    assert not (tmp_path / "cache/index.json").exists()


# ------------------------------------------------------------------------------------------------ kills and damage


class Counted:
    """Encoders that count what they are asked to do, and can be interrupted."""

    def __init__(self, encoders, stop_after=None):
        self.encoders, self.count, self.texts, self.stop_after = encoders, 0, 0, stop_after

    def __getattr__(self, name):
        return getattr(self.encoders, name)

    def images(self, pixels):
        if self.stop_after is not None and self.count >= self.stop_after:
            raise KeyboardInterrupt
        self.count += len(pixels)
        return self.encoders.images(pixels)

    def prompts(self, texts):
        self.texts += len(texts)
        return self.encoders.prompts(texts)


def test_a_finished_cache_is_opened_and_nothing_is_encoded_again(data, encoders, made):
    before, counted, told = digests(made.folder), Counted(encoders), []
    again = build(data, counted, made.folder, dtype="float32", **DRAWN, progress=lambda *entry: told.append(entry))
    assert (counted.count, counted.texts) == (0, 0)
    assert digests(made.folder) == before and again.verify() == []
    assert told == [("texts", 1.0), ("latents", 1.0)]


@pytest.mark.parametrize("after", [0, 3, 12, 21])
def test_an_interrupted_one_goes_on_and_ends_up_the_same(data, encoders, made, after, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(data, Counted(encoders, stop_after=after), tmp_path / "cache", dtype="float32", **DRAWN)
    assert not list((tmp_path / "cache").glob(".*")), "temporary files are left"
    with pytest.raises(UserError, match="index.json is missing"):
        open_cache(tmp_path / "cache")
    whole = len(list((tmp_path / "cache").glob("latents-*.safetensors")))
    assert whole == after // 12
    counted = Counted(encoders)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(data, counted, tmp_path / "cache", dtype="float32", **DRAWN)
    assert counted.count == 3 * ROWS - 12 * whole and counted.texts == 0
    assert digests(tmp_path / "cache") == digests(made.folder)


def test_a_kill_at_any_moment_is_mended(data, encoders, made, tmp_path, monkeypatch):
    """After every single write, as if the process had ended there: first the file, then the note beside it."""
    write, json_write = make_cache.write_bytes, make_cache.write_json
    total = 0
    for stop in range(1, 100):
        folder, done = tmp_path / str(stop), 0

        def counting(function):
            def inner(path, value):
                nonlocal done
                function(path, value)
                done += 1
                if done == stop:  # noqa: B023
                    raise SystemExit

            return inner

        for module in (make_cache, noted_files):
            monkeypatch.setattr(module, "write_bytes", counting(write))
        monkeypatch.setattr(make_cache, "write_json", counting(json_write))
        try:
            build(data, encoders, folder, dtype="float32", **DRAWN)
        except SystemExit:
            total += 1
        for module in (make_cache, noted_files):
            monkeypatch.setattr(module, "write_bytes", write)
        monkeypatch.setattr(make_cache, "write_json", json_write)
        if total < stop:
            break
        build(data, encoders, folder, dtype="float32", **DRAWN)
        assert digests(folder) == digests(made.folder)
    assert total == 19  # key, (captions, 4 texts, 3 latents) x (file, note), rows, index


@pytest.mark.parametrize("name", ["latents-00001.safetensors", "text-00002.safetensors", "captions.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "note"])
def test_damage_is_found_said_and_mended(data, encoders, made, name, damage, tmp_path):
    folder = copy(made.folder, tmp_path / "cache")
    path = folder / name
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        assert name in open_cache(folder).verify() if name != "captions.jsonl" else True
    elif damage == "gone":
        path.unlink()
    else:
        (folder / f"{name}.json").write_text("{")
    with pytest.warns(Notice, match=f"{name} is .*; it is made again"):
        build(data, encoders, folder, dtype="float32", **DRAWN)
    assert digests(folder) == digests(made.folder)


def test_a_damaged_cache_is_not_opened_and_not_read(made, tmp_path):
    folder = copy(made.folder, tmp_path / "cache")
    cache = open_cache(folder)
    shard = folder / "latents-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(UserError, match="latents-00000.safetensors is damaged"):
        cache.latents(0, 0)
    with pytest.raises(UserError, match="latents-00000.safetensors is damaged: its size"):
        open_cache(folder)
    for name, content in (("rows.jsonl", None), ("index.json", "[]"), ("index.json", "{}")):
        folder = copy(made.folder, tmp_path / f"{name}{content}")
        path = folder / name
        path.write_text(content or path.read_text().replace("05.png", "50.png"))
        with pytest.raises(UserError, match=f"{name} is damaged"):
            open_cache(folder)


def test_a_killed_process_is_followed_by_one_that_finishes(sd15, data, encoders, made, tmp_path):
    code = f"""
import sys, time
from accel.distill.data.make_cache import build
from accel.distill.sources.open_data import open_data
from accel.disk import atomic
from accel.distill.data.encoders import Encoders
from accel.models.source import open_source
def slowly(stage, fraction):
    print(stage, fraction, flush=True)
    time.sleep(0.05)
build(open_data(sys.argv[1]), Encoders(open_source(sys.argv[2])), sys.argv[3], dtype="float32", progress=slowly,
      **{DRAWN!r})
"""
    args = [sys.executable, "-c", code, str(data.root), str(sd15), str(tmp_path / "cache")]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("latents") and float(line.split()[1]) > 0.5:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    counted = Counted(encoders)
    build(data, counted, tmp_path / "cache", dtype="float32", **DRAWN)
    assert 0 < counted.count < 3 * ROWS and counted.texts == 0
    assert open_cache(tmp_path / "cache").verify() == []
    assert set(digests(tmp_path / "cache")) == set(digests(made.folder))


def test_what_killed_processes_were_writing_is_removed(data, encoders, tmp_path):
    folder = tmp_path / "cache"
    build(data, encoders, folder, **PLAIN)
    killed, written = folder / ".latents-00008.safetensors.partial", folder / ".latents-00009.safetensors.partial"
    for path in (killed, written):
        path.write_bytes(b"x")
    handle = atomic.acquire(written, wait=False)
    build(data, encoders, folder, **PLAIN)
    assert not killed.exists() and written.exists()
    atomic.release(handle, written)


# ------------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("world", [2, 5])
def test_processes_share_the_work_and_the_result_is_the_same(data, encoders, made, world, tmp_path):
    counted = [Counted(encoders) for _ in range(world)]
    results, failures = {}, []

    def share(rank):
        try:
            results[rank] = build(
                data, counted[rank], tmp_path / "cache", dtype="float32", rank=rank, world=world, **DRAWN
            )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=share, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert digests(tmp_path / "cache") == digests(made.folder)
    assert sum(one.count for one in counted) == 3 * ROWS
    assert all(one.count for one in counted[:3])
    assert all(cache.verify() == [] for cache in results.values())


@pytest.mark.slow
def test_a_process_group_makes_it_and_mends_it_under_a_finished_index(sd15, data, made, tmp_path):
    code = f"""
import sys, torch.distributed as dist
from accel.distill.data.make_cache import build
from accel.distill.sources.open_data import open_data
from accel.disk import atomic
from accel.distill.data.encoders import Encoders
from accel.models.source import open_source
dist.init_process_group("gloo")
cache = build(open_data(sys.argv[1]), Encoders(open_source(sys.argv[2])), sys.argv[3], dtype="float32",
              rank=dist.get_rank(), world=dist.get_world_size(), **{DRAWN!r})
assert cache.verify() == []
dist.destroy_process_group()
"""
    script = tmp_path / "share.py"
    script.write_text(code)
    folder = tmp_path / "cache"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    for damage in (None, "latents-00001.safetensors", "latents-00000.safetensors"):
        if damage:
            (folder / damage).write_bytes(b"x")
        done = subprocess.run(
            [*launch, str(data.root), str(sd15), str(folder)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert damage is None or f"{damage} is damaged; it is made again" in done.stderr
        assert digests(folder) == digests(made.folder)


def test_a_process_that_waits_in_vain_says_for_what(data, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(make_cache, "PATIENCE", 0.5)
    with pytest.raises(UserError, match="3 files are missing in .*, the first one text-00001.safetensors"):
        build(data, encoders, tmp_path / "cache", rank=0, world=2, **PLAIN)


# ----------------------------------------------------------------------------------------------------------- mix-ups


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(resolution=64), "resolution 32, where 64 is wanted"),
        (dict(center_crop=True), "center_crop False, where True is wanted"),
        (dict(random_flip=False), "random_flip True, where False"),
        (dict(seed=4), "seed 3, where 4"),
        (dict(variants=2), "variants 3, where 2"),
        (dict(shard=8), "shard 4, where 8"),
    ],
)
def test_a_cache_of_other_options_is_refused_and_left_alone(data, encoders, made, change, message):
    before = digests(made.folder)
    with pytest.raises(UserError, match=message) as caught:
        build(data, encoders, made.folder, **dict(dtype="float32") | DRAWN | change)
    assert "choose another folder" in caught.value.fix
    assert digests(made.folder) == before


def test_a_cache_of_other_data_or_networks_is_refused(data, damaged, encoders, sdxl, made):
    with pytest.raises(UserError, match="was made with other images or captions\n"):
        build(damaged, encoders, made.folder, dtype="float32", **DRAWN)
    with pytest.raises(UserError, match="was made with another VAE or text encoder\n"):
        build(data, Encoders(open_source(sdxl)), made.folder, dtype="float32", **DRAWN)


def test_training_with_other_options_than_the_caches_is_refused(made):
    options = {name: DRAWN[name] for name in ("resolution", "center_crop", "random_flip", "seed")}
    with pytest.raises(UserError, match="resolution 32, where 64"):
        Examples(None, cache=made, **options | dict(resolution=64))
    with pytest.raises(UserError, match="seed 3, where 9"):
        Examples(None, cache=made, **options | dict(seed=9))


def test_a_folder_of_something_else_is_left_alone(data, encoders, tmp_path):
    (tmp_path / "thesis.tex").write_text("hours of work")
    with pytest.raises(UserError, match="is not empty and not a cache"):
        build(data, encoders, tmp_path, **PLAIN)
    with pytest.raises(UserError, match="thesis.tex is a file"):
        build(data, encoders, tmp_path / "thesis.tex", **PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_without_a_folder_it_goes_to_the_users_cache_and_is_found_there(data, encoders):
    one = build(data, encoders, **PLAIN)
    assert one.folder.is_relative_to(os.environ["ACCEL_CACHE"])
    counted = Counted(encoders)
    assert build(data, counted, **PLAIN).folder == one.folder and counted.count == 0
    assert build(data, counted, **PLAIN | dict(resolution=64)).folder != one.folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype="int8"), "unknown cache dtype 'int8'"),
        (dict(resolution=30), "30 pixels are not a multiple of 4"),
        (dict(variants=0), "variants is 0"),
    ],
)
def test_options_that_cannot_be(data, encoders, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        build(data, encoders, tmp_path / "cache", **PLAIN | change)
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_is_too_small_is_known_beforehand(data, encoders, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 20, 1 << 20, 100))
    counted = Counted(encoders)
    with pytest.raises(UserError, match="are needed in .* and 0.0 GB are free"):
        build(data, counted, tmp_path / "cache", **PLAIN)
    assert counted.count == 0


def test_progress_is_told_after_every_batch(data, encoders, tmp_path):
    told = []
    build(data, encoders, tmp_path / "cache", **PLAIN, progress=lambda *entry: told.append(entry))
    for stage in ("texts", "latents"):
        fractions = [fraction for name, fraction in told if name == stage]
        assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1 and len(fractions) > 4


def test_text_that_half_precision_cannot_hold_is_an_error_that_says_so(data, encoders, tmp_path):
    class Loud(Counted):
        def prompts(self, texts):
            return {"context": 1e5 * torch.ones(len(texts), 77, 32)}

    with pytest.raises(UserError, match="does not fit float16") as caught:
        build(data, Loud(encoders), tmp_path / "cache", **PLAIN)
    assert "--cache-dtype float32" in caught.value.fix
    build(data, Loud(encoders), tmp_path / "other", dtype="float32", **PLAIN)


def test_latents_that_are_not_finite_are_a_broken_row(data, encoders, tmp_path):
    class Once(Counted):
        def images(self, pixels):
            made = super().images(pixels)
            if self.count == len(pixels):
                made["latent_mean"][1] = torch.nan
            return made

    cache = build(data, Once(encoders), tmp_path / "cache", **PLAIN)
    assert cache.broken == {"01.png": "its latents are not finite in float16"}
    whole = build(data, encoders, tmp_path / "whole", **PLAIN)
    for row in (0, 2, 3, 10):
        assert torch.equal(cache.latents(row)["latent_mean"], whole.latents(row)["latent_mean"])


def test_a_finished_cache_in_float32_serves_every_precision(data, sd15, made):
    half = Counted(Encoders(open_source(sd15), dtype=torch.bfloat16))
    again = build(data, half, made.folder, dtype="float16", **DRAWN)
    assert again.key == made.key and again.key["dtype"] == "float32"


def test_a_cache_in_half_precision_does_not_serve_float32(data, sd15, encoders, tmp_path):
    build(data, Encoders(open_source(sd15), dtype=torch.bfloat16), tmp_path / "cache", dtype="float32", **PLAIN)
    with pytest.raises(UserError, match="text_dtype torch.bfloat16"):
        build(data, encoders, tmp_path / "cache", dtype="float32", **PLAIN)


def test_a_lost_part_of_it_is_not_made_in_another_precision(data, sd15, encoders, tmp_path):
    build(data, encoders, tmp_path / "cache", dtype="float32", **PLAIN)
    (tmp_path / "cache/text-00000.safetensors").unlink()
    with pytest.raises(UserError, match="text-00000.safetensors is missing or damaged"):
        build(data, Encoders(open_source(sd15), dtype=torch.bfloat16), tmp_path / "cache", dtype="float32", **PLAIN)


def test_two_variants_of_a_centre_crop_are_mirror_images(data, encoders, tmp_path):
    options = PLAIN | dict(random_flip=True, variants=2)
    examples = Examples(data, **{key: options[key] for key in ("seed", "resolution", "center_crop", "random_flip")})
    for row in range(ROWS):
        first, second = (examples._decoded(0, row, epoch)["pixels"] for epoch in (0, 1))
        assert torch.equal(first.flip(-1), second)


def test_a_finished_cache_is_read_through_once(data, encoders, tmp_path, monkeypatch):
    from accel.distill.data import cache as module

    build(data, encoders, tmp_path / "cache", **PLAIN)
    read = []
    monkeypatch.setattr(module, "sha256", lambda path: read.append(path.name) or sha256(path))

    def again():
        read.clear()
        build(data, encoders, tmp_path / "cache", **PLAIN)
        return list(read)

    again()  # a file and its note may be of the same tick of the clock
    assert again() == []
    touched = tmp_path / "cache" / "text-00000.safetensors"
    touched.touch()
    assert again() == [touched.name]
    again()
    assert again() == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_vae_encodes_in_half_precision_if_asked(data, sd15, made, tmp_path, dtype):
    half = Encoders(open_source(sd15))
    half.encode_in(dtype)
    cache = build(data, half, tmp_path / "cache", dtype="float32", **DRAWN)
    ours, theirs = cache.latents(2, 1)["latent_mean"], made.latents(2, 1)["latent_mean"]
    error = (ours - theirs).norm() / theirs.norm()
    assert 0 < error < 0.05
    with pytest.raises(UserError, match=f"vae_dtype torch.{dtype}, where torch.float32 is wanted"):
        build(data, Encoders(open_source(sd15)), tmp_path / "cache", dtype="float32", **DRAWN)
    # One in float32 serves them all.
    assert build(data, half, copy(made.folder, tmp_path / "exact"), dtype="float16", **DRAWN).index == made.index


def test_sdxls_vae_is_not_asked_for_float16(sdxl, tmp_path):
    folder = copy(sdxl, tmp_path / "sdxl")
    config = json.loads((folder / "vae" / "config.json").read_text())
    encoders = Encoders(open_source(folder))
    encoders.encode_in("bfloat16")
    with pytest.raises(UserError, match="overflows in float16"):
        encoders.encode_in("float16")
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    Encoders(open_source(folder)).encode_in("float16")
