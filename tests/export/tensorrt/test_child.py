"""The compiler's child process: what it gives back, and that nothing of it is left however it ends.

The child is a real process; only the library in it is a fake. `test_real_builder.py` does the same with the real one.
"""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from accel.errors import UserError
from accel.export.tensorrt import child
from accel.export.tensorrt.compiler import Job
from accel.export.tensorrt.options import BuildOptions

FAKE = Path(__file__).parents[2] / "fakes" / "compiler_with_fake.py"


@pytest.fixture
def job(sd15_bundle):
    """A job of the smallest graph."""
    from dataclasses import asdict

    from accel.bundle import Bundle
    from accel.export.tensorrt import shapes

    bundle = Bundle.open(sd15_bundle)
    component = bundle.component("vae_decoder")
    described = shapes.described(bundle, component, bundle.manifest.profile)
    graph = str(bundle.file(component.graph))
    return Job("tensorrt", "vae_decoder", graph, [described], asdict(BuildOptions(timing_cache=False)))


@pytest.fixture
def fake(monkeypatch):
    """fake(steps, seconds): what the child is to meet."""

    def fake(steps: int = 3, seconds: float = 0.0) -> None:
        monkeypatch.setattr(child, "COMMAND", (sys.executable, str(FAKE), "11.4", str(steps), str(seconds)))

    return fake


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if FAKE.name in " ".join(p.cmdline())]


def test_a_child_gives_the_engine_its_layers_and_its_progress(job, fake):
    fake(6, 0.2)
    seen = []
    done = child.compile_apart(job, lambda stage, fraction: seen.append((stage, fraction)))
    assert done.data.startswith(b"engine file of the fake") and len(done.data) > 100_000
    assert {layer.kind for layer in done.layers} >= {"CaskConvolution", "gemm"}
    assert any(layer.inputs and layer.inputs[0].datatype == "Float" and layer.nodes for layer in done.layers)
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions) and len(set(fractions)) > 3
    assert any("Tactic Selection" in stage for stage, _ in seen)
    assert done.peak_memory > 10 << 20 and children() == []


def test_ctrl_c_ends_the_child_at_once(job, fake):
    fake(100, 0.3)
    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    reached = []

    def progress(stage, fraction):
        if fraction > 0:
            reached.append(time.monotonic())
            _thread.interrupt_main()  # Ctrl-C for this process alone, whatever else runs the tests

    try:
        with pytest.raises(KeyboardInterrupt):
            child.compile_apart(job, progress)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - reached[0] < 5 and children() == []
    assert "build-answers" not in [thread.name for thread in threading.enumerate()]


def test_a_crash_of_the_library_is_told_with_its_signal(job, fake):
    fake(-1)
    with pytest.raises(UserError, match="process that builds vae_decoder was ended by signal 11") as caught:
        child.compile_apart(job, lambda *_: None)
    assert caught.value.fix and children() == []


def test_what_the_child_refuses_arrives_with_its_fix(job, fake):
    from dataclasses import replace

    fake()
    with pytest.raises(UserError, match="TensorRT 11.4.0.106 cannot parse no.onnx of vae_decoder") as caught:
        child.compile_apart(replace(job, graph="/nowhere/no.onnx"), lambda *_: None)
    assert "accel inspect BUNDLE --engine tensorrt" in caught.value.fix


def test_a_parent_that_is_killed_leaves_no_child(job, tmp_path):
    """kill -9: the parent can do nothing any more, so the child has to notice."""
    program = tmp_path / "parent.py"
    program.write_text(
        "import sys\n"
        "from accel.export.tensorrt import child\n"
        "from accel.export.tensorrt.compiler import Job\n"
        f"child.COMMAND = (sys.executable, {str(FAKE)!r}, '11.4', '100', '0.3')\n"
        f"child.compile_apart(Job(**{job.as_dict()!r}), lambda stage, fraction: print(fraction, flush=True))\n"
    )
    parent = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    assert any(float(line) > 0 for line in parent.stdout)
    (started,) = children()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    started.wait(timeout=10)
    assert not started.is_running() and children() == []
