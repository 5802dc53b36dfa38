import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from accel import files
from accel.errors import UserError
from accel.files import cache_dir, digest_of, inside, new_folder, read_json, require_space, sha256, write_json


@contextlib.contextmanager
def without_privileges():
    """Be an ordinary user for a while: root may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that every user can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def bundle_at(path: Path, text: str = "old") -> Path:
    """Something that passes for a bundle."""
    path.mkdir(parents=True)
    (path / "accel.json").write_text("{}")
    (path / "weights").write_text(text)
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


# write_json, read_json, digests


def test_json_comes_back_as_it_was_written(tmp_path):
    value = {"a": [1, 2.5, None, True], "b": {"ü": "é"}}
    write_json(tmp_path / "new" / "x.json", value)
    assert read_json(tmp_path / "new" / "x.json", "x") == value


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken disk")))
    with pytest.raises(OSError, match="broken disk"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_what_json_cannot_say_is_not_written(tmp_path, value):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{}", b"\x00" * 10, b"[" * 100_000, b'{"a": 1} trailing'],
    ids=["empty", "cut", "utf16", "zeros", "deep", "trailing"],
)
def test_a_damaged_json_file_is_named_with_what_it_is(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="the thing is damaged") as caught:
        read_json(path, "the thing")
    assert str(path) in caught.value.message


def test_a_json_file_that_is_missing_or_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="the thing is missing"):
        read_json(tmp_path / "x.json", "the thing")
    with pytest.raises(UserError, match="the thing"):
        read_json(tmp_path, "the thing")


def test_a_json_file_that_may_not_be_read_is_named(open_folder):
    path = open_folder / "x.json"
    path.write_text("{}")
    path.chmod(0)
    with without_privileges(), pytest.raises(UserError, match="the thing"):
        read_json(path, "the thing")


def test_a_digest_does_not_depend_on_the_order_of_keys_but_on_every_value():
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert len({digest_of(v) for v in ({"a": 1}, {"a": 2}, {"b": 1}, [1, 2], [2, 1], "1", 1, None)}) == 8


def test_sha256_is_the_standard_one(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("ACCEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "accel"


@pytest.mark.parametrize("content", [b'{"a":' * 40 + b"1" + b"}" * 40, b"[" * 200 + b"]" * 200])
def test_json_deeper_than_any_file_of_ours_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match="nested more than 32 deep"):
        read_json(tmp_path / "x.json", "the thing")


def test_a_file_that_never_ends_or_is_too_large_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    started = time.monotonic()
    for name, problem in (
        ("pipe", "not an ordinary"),
        ("device", "not an ordinary"),
        ("large", "the most that it may"),
    ):
        with pytest.raises(UserError, match=problem):
            read_json(tmp_path / name, "the thing")
    assert time.monotonic() - started < 1


# inside


def test_an_ordinary_entry_is_inside(tmp_path):
    assert inside(tmp_path, "unet/model.onnx", "the entry") == tmp_path / "unet" / "model.onnx"


@pytest.mark.parametrize(
    "entry",
    [
        "",
        ".",
        "/etc/passwd",
        "//host/share",
        "../secret",
        "unet/../../secret",
        "unet/..",
        "..",
        "..\\secret",
        "unet\\model.onnx",
        "C:/secret",
        "C:secret",
        "file://x",
        "unet/model\0.onnx",
    ],
)
def test_an_entry_that_leaves_the_folder_is_refused(tmp_path, entry):
    with pytest.raises(UserError, match="refused") as caught:
        inside(tmp_path, entry, "the entry")
    assert "the entry" in caught.value.message


def test_an_entry_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="refused"):
        inside(tmp_path, 7, "the entry")


def test_a_symbolic_link_to_a_file_or_through_a_folder_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("s")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(outside / "secret")
    (root / "folder").symlink_to(outside)
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    for entry in ("link", "folder/secret", "dangling"):
        with pytest.raises(UserError, match="symbolic link"):
            inside(root, entry, "the entry")


def test_the_folder_itself_may_be_reached_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert inside(tmp_path / "link", "x", "the entry").read_text() == "x"


# new_folder


def test_the_folder_appears_when_the_body_has_succeeded_and_not_before(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with new_folder(out) as folder:
        (folder / "x").write_text("new")
        assert not out.exists()
    assert (out / "x").read_text() == "new"
    assert leftovers(out.parent) == []
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), UserError("no"), SystemExit(1)])
def test_a_body_that_fails_leaves_what_was_there_untouched(tmp_path, error):
    out = bundle_at(tmp_path / "out")
    with pytest.raises(type(error)), new_folder(out, overwrite=True) as folder:
        (folder / "x").write_text("new")
        raise error
    assert sorted(p.name for p in out.iterdir()) == ["accel.json", "weights"]
    assert leftovers(tmp_path) == []


def test_overwriting_replaces_the_whole_folder(tmp_path):
    out = bundle_at(tmp_path / "out")
    with new_folder(out, overwrite=True) as folder:
        (folder / "x").write_text("new")
    assert [p.name for p in out.iterdir()] == ["x"]
    assert leftovers(tmp_path) == []


def test_what_exists_is_kept_unless_asked_and_the_body_never_runs(tmp_path):
    out = bundle_at(tmp_path / "out")
    with pytest.raises(UserError, match="exists already") as caught, new_folder(out):
        pytest.fail("the work was done for nothing")
    assert "--overwrite" in caught.value.fix
    assert (out / "weights").read_text() == "old"


def test_an_empty_folder_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "out" / "x").exists()


def test_a_folder_or_file_that_is_not_ours_is_never_overwritten(tmp_path):
    photos, file = tmp_path / "photos", tmp_path / "thesis.txt"
    photos.mkdir()
    (photos / "me.jpg").write_text("me")
    file.write_text("words")
    for out in (photos, file):
        with pytest.raises(UserError, match="not something accel wrote"), new_folder(out, overwrite=True):
            pytest.fail("the body must not run")
    assert (photos / "me.jpg").read_text() == "me" and file.read_text() == "words"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_during_the_work_is_not_overwritten(tmp_path, overwrite):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="exists already|not something accel wrote"):
        with new_folder(out, overwrite=overwrite) as folder:
            (folder / "x").write_text("new")
            out.mkdir()
            (out / "me.jpg").write_text("me")
    assert [p.name for p in out.iterdir()] == ["me.jpg"]
    assert leftovers(tmp_path) == []


def test_a_link_to_a_bundle_is_not_followed_into_replacing_it(tmp_path):
    real, link = bundle_at(tmp_path / "real"), tmp_path / "link"
    link.symlink_to(real)
    with pytest.raises(UserError, match="symbolic link"), new_folder(link, overwrite=True):
        pytest.fail("the body must not run")
    assert link.is_symlink() and (real / "weights").read_text() == "old"


def test_the_old_folder_is_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out = bundle_at(tmp_path / "out")
    replace, calls = os.replace, []

    def flaky(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.atomic, "exchange", lambda one, other: False)
    with pytest.raises(UserError, match="no space left"), new_folder(out, overwrite=True):
        monkeypatch.setattr(files.os, "replace", flaky)
    assert (out / "weights").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_names_with_pattern_characters_do_not_touch_others_work(tmp_path):
    other = tmp_path / ".abc.partial-x"
    other.mkdir()
    own = tmp_path / ".a[b]*.partial-x"
    own.mkdir()
    with new_folder(tmp_path / "a[b]*") as folder:
        (folder / "x").write_text("new")
    with new_folder(tmp_path / "a*"):
        pass
    assert other.exists()
    assert not own.exists()


# Several processes, and processes that die


WRITER = """
import os, signal, sys, time
from pathlib import Path
from accel import files
out, moment = Path(sys.argv[1]), sys.argv[2]
if moment in ("between", "tidying"):  # a file system that cannot exchange two names
    files.atomic.exchange = lambda one, other: False
if moment == "exchanged":
    files._remove = lambda path: os.kill(os.getpid(), signal.SIGKILL)
if moment == "between":
    replace = os.replace
    def deadly(source, target):
        replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    files.os.replace = deadly
if moment == "tidying":
    rmtree = files.shutil.rmtree
    files.shutil.rmtree = lambda path, *args, **how: (
        os.kill(os.getpid(), signal.SIGKILL) if str(path).endswith(".previous") else rmtree(path, *args, **how))
with files.new_folder(out, overwrite=True) as folder:
    (folder / "weights").write_text("half")
    (folder / "accel.json").write_text("{}")
    print("ready", flush=True)
    if moment == "body":
        time.sleep(60)
"""


def writer(out: Path, moment: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(out), moment], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_writer_is_told_to_wait_and_the_first_is_not_disturbed(tmp_path):
    out = tmp_path / "out"
    process = writer(out, "body")
    try:
        with pytest.raises(UserError, match="another process is writing"), new_folder(out):
            pytest.fail("two writers at once")
        roundabout = tmp_path / "x" / ".." / "out"
        (tmp_path / "x").mkdir()
        with pytest.raises(UserError, match="another process is writing"), new_folder(roundabout):
            pytest.fail("two writers at once, by another spelling")
        assert len(leftovers(tmp_path)) == 2  # the lock and the unfinished folder
    finally:
        process.kill()
        process.wait()


def test_a_killed_writer_leaves_the_old_folder_and_the_next_one_tidies_up(tmp_path):
    out = bundle_at(tmp_path / "out")
    process = writer(out, "body")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "weights").read_text() == "old"
    assert len(leftovers(tmp_path)) == 2
    with new_folder(out, overwrite=True) as folder:
        (folder / "weights").write_text("new")
    assert (out / "weights").read_text() == "new"
    assert leftovers(tmp_path) == []


def test_killed_between_the_two_renames_the_old_folder_comes_back(tmp_path):
    out = bundle_at(tmp_path / "out")
    writer(out, "between").wait()
    assert not out.exists()
    with pytest.raises(UserError, match="exists already"), new_folder(out):
        pytest.fail("the old folder is there again")
    assert (out / "weights").read_text() == "old"


def test_killed_between_the_two_renames_the_next_reader_finds_the_old_folder(tmp_path):
    out = bundle_at(tmp_path / "out")
    writer(out, "between").wait()
    files.settle(out)
    assert (out / "weights").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_an_overwrite_is_one_rename_and_what_it_leaves_when_killed_goes_with_the_next_reader(tmp_path):
    out = bundle_at(tmp_path / "out")
    writer(out, "exchanged").wait()
    assert (out / "weights").read_text() == "half"
    assert len(leftovers(tmp_path)) == 2
    files.settle(out)
    assert leftovers(tmp_path) == []
    assert (out / "weights").read_text() == "half"


def test_a_reader_disturbs_no_writer_and_changes_nothing_where_it_may_not(tmp_path):
    out = tmp_path / "out"
    process = writer(out, "body")
    try:
        before = leftovers(tmp_path)
        files.settle(out)
        assert leftovers(tmp_path) == before
    finally:
        process.kill()
        process.wait()


def test_the_second_writer_is_told_who_the_first_is(tmp_path):
    process = writer(tmp_path / "out", "body")
    try:
        with pytest.raises(UserError, match=f"process {process.pid} on {os.uname().nodename}, since 2"):
            with new_folder(tmp_path / "out"):
                pytest.fail("two writers at once")
    finally:
        process.kill()
        process.wait()


def test_the_lock_does_not_depend_on_the_users_cache(tmp_path, monkeypatch):
    """Two containers share a volume, and nothing else."""
    process = writer(tmp_path / "out", "body")
    try:
        monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "another"))
        with pytest.raises(UserError, match="another process is writing"), new_folder(tmp_path / "out"):
            pytest.fail("two writers at once")
    finally:
        process.kill()
        process.wait()


def test_a_thread_may_write_in_steps_what_it_holds_and_others_may_not(tmp_path):
    out = tmp_path / "out"
    with files.exclusive(out):
        with new_folder(out) as folder:
            (folder / "accel.json").write_text("{}")
        with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="another process is writing"):
            pool.submit(new_folder(out, overwrite=True).__enter__).result()
    with new_folder(out, overwrite=True):
        pass


def test_what_a_killed_write_left_is_written_over_and_what_is_being_written_is_not_swept(tmp_path):
    (tmp_path / ".x.partial").write_text("half of something longer than the new")
    files.write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new" and leftovers(tmp_path) == []
    (tmp_path / ".y.partial").write_text("half")
    handle = files.atomic.acquire(tmp_path / ".z.partial", wait=False)
    files.sweep(tmp_path)
    assert leftovers(tmp_path) == [".z.partial"]
    os.close(handle)


def test_killed_while_removing_the_old_folder_the_new_one_counts_and_can_be_replaced(tmp_path):
    out = bundle_at(tmp_path / "out")
    writer(out, "tidying").wait()
    assert (out / "weights").read_text() == "half"
    with new_folder(out, overwrite=True) as folder:
        (folder / "weights").write_text("new")
    assert (out / "weights").read_text() == "new"
    assert leftovers(tmp_path) == []


def test_the_lock_goes_with_its_process(tmp_path):
    process = writer(tmp_path / "out", "body")
    process.kill()
    process.wait()
    started = time.monotonic()
    with new_folder(tmp_path / "out"):
        pass
    assert time.monotonic() - started < 5


# Disks and permissions


def test_a_parent_that_may_not_be_written_is_named(open_folder):
    parent = open_folder / "parent"
    parent.mkdir()
    parent.chmod(0o555)
    with without_privileges(), pytest.raises(UserError, match="no permission to write") as caught:
        with new_folder(parent / "out"):
            pytest.fail("the body must not run")
    assert str(parent / "out") in caught.value.message
    assert leftovers(parent) == []


def test_a_parent_that_may_not_be_entered_is_named(open_folder):
    parent = open_folder / "parent"
    parent.mkdir()
    parent.chmod(0)
    for work in (lambda: new_folder(parent / "out").__enter__(), lambda: require_space(parent / "deep" / "out", 1)):
        with without_privileges(), pytest.raises(UserError, match="no permission"):
            work()


def test_a_parent_that_is_a_file_is_told_apart(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(UserError, match="a part of that path is a file"), new_folder(out):
            pytest.fail("the body must not run")


@pytest.mark.parametrize("name", ["n" * 300, "zero\0byte"])
def test_a_name_that_no_file_system_takes_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot be"), new_folder(tmp_path / name):
        pytest.fail("the body must not run")


def test_a_full_disk_is_named_and_nothing_stays(tmp_path):
    out = bundle_at(tmp_path / "out")
    with pytest.raises(UserError, match="no space left while writing") as caught:
        with new_folder(out, overwrite=True):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert "free some space" in caught.value.fix
    assert (out / "weights").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_full_disk_is_recognised_inside_a_copied_tree(tmp_path):
    problem = shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])
    with pytest.raises(UserError, match="no space left"), new_folder(tmp_path / "out"):
        raise problem


def test_a_file_that_cannot_be_read_is_not_blamed_on_the_target(tmp_path):
    source = str(tmp_path / "source" / "weights")
    with pytest.raises(UserError) as caught, new_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", source)
    assert source in caught.value.message
    assert str(tmp_path / "out") not in caught.value.message


def test_too_little_space_fails_before_the_work(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: free)
    require_space(tmp_path / "not" / "yet", 10**9)
    with pytest.raises(UserError, match=r"2\.0 GB are needed .* 1\.0 GB are free"):
        require_space(tmp_path / "not" / "yet", 2 * 10**9)
