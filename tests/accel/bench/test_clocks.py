"""A GPU's clocks while it is timed, from an `nvidia-smi` of our own; and the names that a profiler sees."""

from __future__ import annotations

import importlib
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import accel
from accel.bench import clocks, facts, measure, report, timing, variants
from accel.bench.work import BenchSettings

measure_module = importlib.import_module("accel.bench.measure")  # the package's name is the function's

LINES = (
    "0, 3, 345, 1980, 2619, 90.10, 700.00, 31, 0x0000000000000001",  # idle, between two turns
    "0, 99, 1980, 1980, 2619, 410.00, 700.00, 52, 0x0000000000000000",
    "0, 100, 1755, 1980, 2619, 699.00, 700.00, 64, 0x0000000000000004",
    "1, 0, 210, 1980, 2619, 70.00, 700.00, 30, 0x0000000000000001",
)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """An `nvidia-smi` that says these lines over and over, as `--loop-ms` asks."""

    def made(*lines):
        says = "\n".join(f"echo '{line}'" for line in lines)
        path = tmp_path / "nvidia-smi"
        path.write_text(
            f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n'
            f'if [[ "$*" != *loop-ms* ]]; then exit 9; fi\nwhile true; do\n{says}\nsleep 0.05\ndone\n'
        )
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        return tmp_path / "asked"

    return made


def seen(*lines):
    watched = clocks.Clocks()
    for line in lines:
        watched.add(line)
    return watched.summary()


def test_the_busiest_gpu_counts_and_only_while_it_was_busy():
    found = seen(*LINES)
    assert found == {
        "samples": 2,
        "sm_mhz": [1755, 1867.5, 1980],
        "sm_max_mhz": 1980,
        "memory_mhz": 2619,
        "watts": [554.5, 699],
        "watts_limit": 700,
        "celsius": 64,
        "held_back": ["power limit"],
    }
    said = clocks.sentence(found)
    assert said == "GPU while timed: 1,868 of 1,980 MHz, 554 of 700 W, 64 degrees; held back by power limit"
    assert clocks.sentence(seen(*LINES[1:2])).endswith("; not held back")


def test_a_card_that_does_not_say_everything_is_described_by_what_it_says():
    found = seen("0, [N/A], 1500, 2100, [N/A], [N/A], [N/A], 60, [N/A]", "garbage", "")
    assert found["samples"] == 1 and found["watts"] == [None, None] and found["held_back"] == []
    assert clocks.sentence(found) == "GPU while timed: 1,500 of 2,100 MHz, 60 degrees; not held back"
    assert seen() is None


def test_it_watches_until_the_end_and_leaves_no_process(program):
    asked = program(*LINES)
    watched = clocks.Clocks()
    with clocks.watch(watched):
        until = time.monotonic() + 20
        while len(watched.samples) < 8 and time.monotonic() < until:
            time.sleep(0.02)
    count = len(watched.samples)
    assert count >= 8 and "clocks_event_reasons.active" in asked.read_text()
    time.sleep(0.2)
    assert len(watched.samples) == count


def test_without_the_program_nothing_is_sampled(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    watched = clocks.Clocks()
    with clocks.watch(watched):
        pass
    assert watched.summary() is None


def test_the_bench_keeps_it_and_says_it(monkeypatch):
    """As on a GPU, with samples of our own."""

    @contextmanager
    def watch(watched):
        watched.add(LINES[2])
        yield

    monkeypatch.setattr(clocks, "watch", watch)
    own = facts.environment
    monkeypatch.setattr(facts, "environment", lambda state: own(state) | {"device": "cuda"})
    monkeypatch.setattr(timing, "GPU_LEAD_IN_S", 0.0)
    settings = BenchSettings(prompts=("a handwritten seven",), rounds=1, steps=1, memory=False)
    document = measure("digits/4step-int8", variants.chosen("onnxruntime"), settings).document.as_dict()
    assert document["rows"][0]["scopes"]["image"]["busy_s"] is None  # ran on the CPU after all
    assert not any("GPU busy" in columns for _, columns, _ in report.tables(document))
    kept = document["environment"]["gpu_clocks"]
    assert kept["watts"] == [699, 699] and clocks.sentence(kept) in report.headline(document)


class Profile:
    """torch's profiler on a GPU that copies for 2 ms, and runs a kernel of 5 ms from the middle of that on."""

    def __init__(self, activities):
        assert activities == [torch.profiler.ProfilerActivity.CUDA]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def events(self):
        cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
        spans = [(9000, 14000, cuda, False), (8000, 10000, cuda, False), (0, 99000, cuda, True), (0, 5000, cpu, False)]
        return [
            SimpleNamespace(time_range=SimpleNamespace(start=a, end=b), device_type=device, is_user_annotation=said)
            for a, b, device, said in spans
        ]


def test_how_long_a_gpu_is_busy(monkeypatch):
    """As on a GPU: its name and profiler are ours. A variant that fails under the profiler keeps its other figures."""
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    own, warm = facts.environment, measure_module._warm_up
    monkeypatch.setattr(facts, "environment", lambda state: own(state) | {"device": "cuda"})
    monkeypatch.setattr(timing, "GPU_LEAD_IN_S", 0.0)

    def warm_up(state, *rest):
        warm(state, *rest)
        state.devices = dict.fromkeys(state.devices, "cuda")
        eager = state.calls["unet"]["eager"]
        turns = iter(range(2))  # a lead-in and one round; what comes then is watched by the profiler
        state.calls["unet"]["eager"] = lambda: eager() if next(turns, None) is not None else 1 / 0

    monkeypatch.setattr(measure_module, "_warm_up", warm_up)
    settings = BenchSettings(prompts=("a handwritten seven",), rounds=1, steps=1, memory=False)
    document = measure("digits/4step", variants.chosen("eager,eager:bf16"), settings).document.as_dict()
    rows = {row["variant"]: row["scopes"] for row in document["rows"]}
    for name, scopes in rows.items():
        for scope, found in scopes.items():
            if (name, scope) != ("eager", "unet"):
                assert found["busy_s"] == pytest.approx(0.006), (name, scope)
    assert rows["eager"]["unet"]["busy_s"] is None and rows["eager"]["unet"]["timing"]["n"] == 1
    assert any(
        "eager, unet: not known how long the GPU was busy: ZeroDivisionError" in note for note in document["notes"]
    )
    columns, cells = next((columns, cells) for _, columns, cells in report.tables(document))
    assert columns[-1] == "GPU busy" and all(len(row) == len(columns) and row[-1] == "6 ms" for row in cells)


def test_a_profiler_sees_phases_and_steps(monkeypatch):
    ranges, open_ = [], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: ranges.append(name) or open_.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: open_.pop())
    with accel.load("digits/4step-int8", "onnxruntime") as pipe:
        pipe("a handwritten seven", steps=2, seed=0, progress=False)
    steps = [f"accel step {i}" for i in range(2)]
    assert ranges == ["accel text_encoder", "accel unet", *steps, "accel vae_decoder"] and not open_
    ranges.clear()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with accel.load("digits/4step-int8", "onnxruntime") as pipe:
        pipe("a handwritten seven", steps=2, seed=0, progress=False)
    assert not ranges
