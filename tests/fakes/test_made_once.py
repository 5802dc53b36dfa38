"""What tests share is made once, whole, and again when the code that makes it has changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("made_once.py")
# Notes that it makes, waits for `go`, and then writes what is asked for.
ASKS = f"""
import os, sys, time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
spec = spec_from_file_location("made_once", {str(FILE)!r})
module = module_from_spec(spec)
spec.loader.exec_module(module)
place = Path(sys.argv[1])
def make(folder):
    (folder / "first").write_text("half of it")
    with (place / "makers").open("a") as file:
        print(os.getpid(), file=file, flush=True)
    while not (place / "go").exists():
        time.sleep(0.01)
    (folder / "second").write_text("the other half")
print(sorted(path.name for path in module.made_once(place, "key", make).iterdir()))
"""


@pytest.fixture
def made_once(fakes):
    return fakes("made_once")


def asks(place: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", ASKS, str(place)], stdout=subprocess.PIPE, text=True)


def wait_for_makers(place: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not (place / "makers").exists() or len((place / "makers").read_text().split()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_of_two_processes_that_ask_at_once_one_makes_it_and_both_get_the_whole(tmp_path):
    first = asks(tmp_path)
    wait_for_makers(tmp_path, 1)
    second = asks(tmp_path)
    time.sleep(0.5)
    assert not (tmp_path / "key").exists() and second.poll() is None
    (tmp_path / "go").touch()
    assert {process.communicate(timeout=60)[0].strip() for process in (first, second)} == {"['first', 'second']"}
    assert (tmp_path / "makers").read_text().split() == [str(first.pid)]


def test_a_killed_maker_leaves_nothing_that_is_taken_for_made(tmp_path):
    killed = asks(tmp_path)
    wait_for_makers(tmp_path, 1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "key").exists()
    (tmp_path / "key.partial" / "left over").touch()
    (tmp_path / "go").touch()
    assert asks(tmp_path).communicate(timeout=60)[0].strip() == "['first', 'second']"
    assert len((tmp_path / "makers").read_text().split()) == 2


def test_what_is_there_is_not_made_again_and_a_failure_is_not_kept(made_once, tmp_path):
    def fails(folder):
        (folder / "file").touch()
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        made_once.made_once(tmp_path, "key", fails)
    made = made_once.made_once(tmp_path, "key", lambda folder: (folder / "other").touch())
    assert [path.name for path in made.iterdir()] == ["other"]
    assert made_once.made_once(tmp_path, "key", fails) == made


def test_changed_moved_and_new_code_have_another_digest(made_once, tmp_path):
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "inner" / "one.py").write_text("1")
    (package / "notes.txt").write_text("1")
    (tmp_path / "single.py").write_text("1")

    def found() -> str:
        return made_once.digest_of_code(tmp_path, ("package", "single.py"))

    seen = [found()]
    (package / "notes.txt").write_text("2")
    assert found() == seen[0]
    (package / "inner" / "one.py").write_text("2")
    seen.append(found())
    (tmp_path / "single.py").write_text("2")
    seen.append(found())
    (package / "inner" / "one.py").rename(package / "one.py")
    seen.append(found())
    (package / "two.py").touch()
    seen.append(found())
    assert len(set(seen)) == 5


def test_the_store_is_that_of_the_code_and_forgets_what_nobody_used(made_once, tmp_path):
    for name in made_once.MAKERS:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1") if path.suffix else path.mkdir()
    (tmp_path / "export" / "graph.py").write_text("1")
    first = made_once.store.__wrapped__(tmp_path)
    assert made_once.store.__wrapped__(tmp_path) == first
    (tmp_path / "export" / "graph.py").write_text("2")
    second = made_once.store.__wrapped__(tmp_path)
    assert first != second and first.is_dir()
    long_ago = time.time() - 2 * made_once.A_WEEK
    os.utime(first / "used", (long_ago, long_ago))
    assert made_once.store.__wrapped__(tmp_path) == second
    assert second.is_dir() and not first.exists()
