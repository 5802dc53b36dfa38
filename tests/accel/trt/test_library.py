"""The `tensorrt` module: versions that are missing or too old, and one logger for the process."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from accel.errors import UserError
from accel.trt import library


def test_a_tensorrt_that_is_too_old_or_missing_is_named(tensorrt, monkeypatch):
    assert library.load().module is tensorrt
    monkeypatch.setattr(tensorrt, "__version__", "10.9.0")
    with pytest.raises(UserError, match="TensorRT 10.9.0 is too old"):
        library.load()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match="not installed") as caught:
        library.load()
    assert "accel-diffusion[tensorrt]" in caught.value.fix


@pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)
def test_threads_that_begin_together_share_one_logger(tensorrt, monkeypatch):
    make, together, found = library._make_logger, threading.Barrier(4), []

    def slowly(module):
        time.sleep(0.05)
        return make(module)

    def begin():
        together.wait()
        found.append(library.logger(tensorrt))

    monkeypatch.setattr(library, "_make_logger", slowly)
    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(map(id, found))) == 1
