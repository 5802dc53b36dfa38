"""Caches of a measurement: empty, deleted afterwards, and with the key that lets this user's engine files run."""

from __future__ import annotations

from accel.bench.state import temporary_caches
from accel.files import cache_dir
from accel.trt import trust


def test_engine_files_that_were_signed_before_run_in_temporary_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "own"))
    signature = trust.sign(b"a record")
    (tmp_path / "own" / "compiled").write_text("earlier")
    with temporary_caches() as caches:
        assert str(cache_dir()) == caches["ACCEL_CACHE"] and trust.signed(b"a record", signature)
        assert [path.name for path in cache_dir().iterdir()] == [trust.key_file().name]
        place = cache_dir()
    assert not place.exists() and cache_dir() == tmp_path / "own"


def test_without_a_key_they_are_just_empty(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "own"))
    with temporary_caches():
        assert not cache_dir().exists() and not trust.signed(b"a record", "00")
