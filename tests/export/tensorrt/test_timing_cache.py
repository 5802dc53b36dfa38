"""The timing cache: one file per GPU and TensorRT version."""

from __future__ import annotations

import hashlib
import json
import threading

import pytest

from accel.export.tensorrt import timing_cache
from accel.export.tensorrt.build import BuildOptions, build
from accel.trt import library
from accel.trt.engine_files import Here

VAE = ("vae_decoder",)
# For what calls nothing of TensorRT that the other tests do not call: one version shows it.
NEWEST = pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)


def here(tensorrt) -> Here:
    return Here(tensorrt.__version__, "Fake GPU", "9.0")


def kept(path):
    """What a file of the timing cache holds, after its digest."""
    return json.loads(path.read_bytes()[32:])


def test_the_timing_cache_is_one_file_per_gpu_and_version_and_only_grows(bundle, tensorrt):
    build(bundle, VAE)
    path = timing_cache.path_for(here(tensorrt))
    stamp, first = kept(path)
    assert tensorrt.__version__ in path.name and "Conv" in first
    other = json.dumps([stamp, ["from another build"]]).encode()
    path.write_bytes(hashlib.sha256(other).digest() + other)
    build(bundle, ("text_encoder",))
    assert "from another build" in kept(path)[1]
    # Damaged, cut off, or without a digest as accel 0.2 wrote them: each counts as empty. TensorRT itself takes some.
    for damaged in (b"garbage", path.read_bytes()[:-1], other):
        path.write_bytes(damaged)
        build(bundle, VAE, force=True)
        assert "Conv" in kept(path)[1] and "from another build" not in kept(path)[1]
    before = path.read_bytes()
    build(bundle, VAE, options=BuildOptions(timing_cache=False), force=True)
    assert path.read_bytes() == before


@NEWEST
def test_builds_that_end_together_lose_no_measurements(tensorrt):
    path, together = timing_cache.path_for(here(tensorrt)), threading.Barrier(8)
    builder = tensorrt.Builder(library.logger(tensorrt))

    def end(number):
        config = builder.create_builder_config()
        timing_cache.load(config, path)
        config.get_timing_cache()._entries.add(f"kernel {number}")
        together.wait()
        timing_cache.save(config, path)

    threads = [threading.Thread(target=end, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept(path)[1] == [f"kernel {number}" for number in range(8)]
