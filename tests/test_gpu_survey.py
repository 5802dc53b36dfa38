"""benchmarks/gpu_survey.py on a CPU and small sizes: it goes on where it stopped, and survives what fails."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(BENCHMARKS))
    yield import_module("gpu_survey")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def cases(script):
    """One of each kind: compiling every combination would take minutes."""
    every = script.Survey("cpu", script.tiny()).cases()
    slow = ("compile", "max-autotune")
    kept = ("16 px, nhwc, patched, compile", "small, batch 1, nhwc max-autotune", "small, compile")
    return [case for case in every if case.key in kept or not any(word in case.key for word in slow)]


@pytest.fixture(scope="module")
def file(script, cases, tmp_path_factory):
    """Every case on the CPU, in two runs."""
    file = tmp_path_factory.mktemp("survey") / "rows.jsonl"
    half = script.survey(cases[: len(cases) // 2], file, seconds=1e6)
    assert half == [] and script.survey(cases, file, seconds=1e6) == []
    return file


def test_every_case_has_a_row_and_only_what_needs_a_gpu_fails(script, cases, file):
    rows = script.rows_of(file)
    assert [(row["step"], row["key"]) for row in rows] == [(case.step, case.key) for case in cases]
    assert len(file.read_text().splitlines()) == len(cases)  # none was measured twice
    for row in rows:
        expects_gpu = "graph" in row["key"] or row["step"] == "attention" and "sdpa" not in row["key"]
        assert row["ok"] or expects_gpu, row
        assert row["ok"] or "GPU" in row["error"] or "CUDA" in row["error"], row
    by_key = {row["key"]: row.get("figures") for row in rows}
    assert by_key["small, math"]["relative_error"] < 0.01
    assert by_key["16 px, nhwc, patched, eager"]["relative_difference"] < 0.05
    assert by_key["small, batch 1, nchw eager"]["flop"] > 0


def test_a_case_that_fails_is_tried_again_only_when_asked_for(script, tmp_path):
    tries = []

    def breaks():
        tries.append(1)
        raise RuntimeError("out of memory\nand a trace")

    cases = [script.Case("a", "breaks", 1, breaks), script.Case("a", "works", 1, lambda: {"ms": 2.0})]
    for again in (False, False, True):
        script.survey(cases, tmp_path / "rows.jsonl", seconds=100, again=again)
    rows = script.rows_of(tmp_path / "rows.jsonl")
    assert len(tries) == 2 and [row["ok"] for row in rows] == [False, True]
    assert rows[0]["error"] == "RuntimeError: out of memory"


def test_nothing_is_begun_that_may_not_end_in_time_and_a_torn_line_is_measured_again(script, tmp_path):
    file, ran = tmp_path / "rows.jsonl", []
    cases = [script.Case("a", str(s), s, lambda s=s: ran.append(s) or {}) for s in (1, 500, 2)]
    assert [case.seconds for case in script.survey(cases, file, seconds=100)] == [500] and ran == [1, 2]
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])  # killed while it wrote
    script.survey(cases, file, seconds=100)
    assert ran == [1, 2, 2] and {row["key"] for row in script.rows_of(file)} == {"1", "2"}


def test_the_report_answers_what_was_asked(script, file, tmp_path):
    rows = [
        {"step": "unet", "key": f"SDXL, batch 1, {way}", "ok": True, "seconds": 1, "figures": {"ms": ms}}
        for way, ms in (("nchw eager", 40.0), ("nchw graph", 20.0))
    ]
    rows += [
        {"step": "attention", "key": f"SDXL, {kernel}", "ok": True, "seconds": 1, "figures": {"ms": ms}}
        for kernel, ms in (("math", 3.0), ("cudnn", 1.0))
    ]
    text = script.report(rows)
    assert "* CUDA graph against eager, UNet: SDXL, batch 1: 40 -> 20 ms (2.00x)." in text
    assert "* Fastest attention: SDXL: cudnn (1 ms)." in text
    assert "* Linear layers in int8, UNet: not measured." in text
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu-survey -->\n<!-- /gpu-survey -->\nafter\n")
    command = [sys.executable, str(BENCHMARKS / "gpu_survey.py"), "--out", str(file.parent), "--report"]
    subprocess.run([*command, "--page", str(page)], check=True)
    assert "| small, math |" in page.read_text() and page.read_text().endswith("after\n")
    assert len(json.loads((tmp_path / "page.json").read_text())["rows"]) == len(script.rows_of(file))


def test_the_full_survey_fits_into_calls_of_ten_minutes(script):
    cases = list(script.Survey("cuda", script.full(), whole=True).cases())
    assert max(case.seconds for case in cases) <= 560 and len({(c.step, c.key) for c in cases}) == len(cases)
    assert [case.step for case in cases[:2]] == ["machine", "ceiling"]
