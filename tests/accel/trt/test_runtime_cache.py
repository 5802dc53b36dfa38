"""The runtime cache of TensorRT-RTX: one per engine file, version and card, always whole, shared by processes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from accel.machine import Gpu
from accel.trt import runtime_cache

CARD = Gpu(name="NVIDIA GeForce RTX 4090", memory=24 << 30, compute_capability="8.9", driver="580.95")


class Cache:
    """What TensorRT's runtime cache does with bytes."""

    def __init__(self, data: bytes = b""):
        self.data, self.given = data, []

    def serialize(self) -> bytes:
        return self.data

    def deserialize(self, data: bytes) -> bool:
        self.given.append(data)
        return True


@pytest.fixture
def path(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    return runtime_cache.path_for("a" * 64, "1.7.1.116", CARD)


def test_each_engine_file_version_card_and_driver_has_its_own(path, tmp_path):
    from dataclasses import replace

    others = [
        runtime_cache.path_for("b" * 64, "1.7.1.116", CARD),
        runtime_cache.path_for("a" * 64, "1.8.0.1", CARD),
        runtime_cache.path_for("a" * 64, "1.7.1.116", replace(CARD, name="NVIDIA GeForce RTX 5090")),
        runtime_cache.path_for("a" * 64, "1.7.1.116", replace(CARD, driver="590.10")),
    ]
    assert len({path, *others}) == 5 and all(tmp_path in p.parents for p in (path, *others))


def test_what_was_saved_is_what_the_next_one_starts_from(path):
    runtime_cache.save(Cache(b"kernels"), path)
    cache = Cache()
    runtime_cache.load(cache, path)
    assert cache.given == [b"kernels"] and path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"x" + data[1:], lambda data: b"", bytes.upper]
)
def test_a_damaged_file_counts_as_empty_and_is_written_anew(path, damage):
    runtime_cache.save(Cache(b"kernels"), path)
    path.write_bytes(damage(path.read_bytes()))
    cache = Cache()
    runtime_cache.load(cache, path)
    assert cache.given == []
    runtime_cache.save(Cache(b"new"), path)
    runtime_cache.load(cache, path)
    assert cache.given == [b"new"]


def test_a_file_that_others_can_write_is_not_read(path):
    runtime_cache.save(Cache(b"kernels"), path)
    path.chmod(0o666)
    cache = Cache()
    runtime_cache.load(cache, path)
    assert cache.given == []


def test_less_does_not_replace_more(path):
    runtime_cache.save(Cache(b"many kernels"), path)
    runtime_cache.save(Cache(b"few"), path)
    cache = Cache()
    runtime_cache.load(cache, path)
    assert cache.given == [b"many kernels"]


WRITER = """
import sys
from pathlib import Path
from accel.trt import runtime_cache

class Cache:
    def serialize(self):
        return self.data

path, letter = Path(sys.argv[1]), sys.argv[2].encode()
print("ready", flush=True)
sys.stdin.readline()
for size in range(1, 60):
    cache = Cache()
    cache.data = letter * (size * 5000)
    runtime_cache.save(cache, path)
"""


def test_processes_that_save_together_leave_it_whole_at_every_moment(path, tmp_path):
    """Three write growing caches, one reads meanwhile: what it reads is one of theirs from end to end."""
    program = tmp_path / "writer.py"
    program.write_text(WRITER)
    writers = [
        subprocess.Popen(
            [sys.executable, str(program), str(path), letter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for letter in "abc"
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            continue
        assert hashlib.sha256(content[32:]).digest() == content[:32] and len(set(content[32:])) == 1
        seen.add(len(content))
    assert [writer.wait() for writer in writers] == [0, 0, 0] and len(seen) > 1
    cache = Cache()
    runtime_cache.load(cache, path)
    assert len(cache.given[0]) == 59 * 5000, "the largest is what is left"
    assert sorted(p.name for p in path.parent.iterdir() if p.suffix not in (".lock",)) == [path.name]
