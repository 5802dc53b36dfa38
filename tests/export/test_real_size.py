"""Real-size networks: minutes and gigabytes, so marked slow (`make test-slow`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "accel", *sys.argv[1:]])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"code": done.returncode, "peak": peak}))
"""


def make(topology, folder):
    subprocess.run([sys.executable, ROOT / "benchmarks/random_pipeline.py", topology, folder], check=True)
    return folder


def export(source, out, *options):
    """Run the command in a process of its own; returns its peak resident memory in bytes."""
    command = [sys.executable, "-c", MEASURED, "export", source, out, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["code"] == 0, done.stderr
    return result["peak"]


@pytest.mark.slow
def test_sd_tiny_in_fp32_fits_three_times_its_weights(tmp_path):
    source = make("sd15-tiny", tmp_path / "source")
    peak = export(source, tmp_path / "bundle", "--components", "unet", "--profile", "batch=1-2,size=256")
    weights = (tmp_path / "bundle/unet/model.safetensors").stat().st_size
    assert weights == pytest.approx(4 * 323_384_964, rel=0.001)
    assert peak < 3 * weights, f"{peak / weights:.2f} x"
    assert (tmp_path / "bundle/unet/model.onnx").stat().st_size < 3e6  # the weights are stored once


@pytest.mark.slow
def test_sdxl_in_fp16_fits_24_gib_and_goes_beyond_protobufs_2_gb(tmp_path):
    source = make("sdxl", tmp_path / "source")
    options = ("--components", "unet", "--precision", "fp16", "--profile", "batch=1-2,size=512")
    peak = export(source, tmp_path / "bundle", *options)
    weights = (tmp_path / "bundle/unet/model.safetensors").stat().st_size
    assert weights > 5e9
    assert peak < 24 * 2**30, f"{peak / 2**30:.1f} GiB"


@pytest.mark.slow
def test_the_benchmark_of_sdxl_runs_its_stages_on_a_narrowed_network(sdxl, tmp_path):
    command = [
        sys.executable,
        ROOT / "benchmarks/sdxl_real_size.py",
        "--work",
        tmp_path / "work",
        "--source",
        sdxl,
        "--size",
        "64",
        "--json",
        tmp_path / "result.json",
    ]
    subprocess.run(command, check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["stages"]) == {"export", "torch", "onnxruntime"} and result["fits_24_gib"]
    assert all(2**26 < values["peak_bytes"] < 2**33 for values in result["stages"].values())
    assert 0 < result["parity"]["step_relative_l2"] < result["parity"]["limit"] < 0.1
    assert result["files_bytes"]["model.safetensors"] > 2 * result["parameters"]
