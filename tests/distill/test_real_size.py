"""One distillation step at the real size of Stable Diffusion 1.5: minutes and gigabytes, so slow (`make test-slow`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "accel", *sys.argv[1:]])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"code": done.returncode, "peak": peak}))
"""


@pytest.mark.slow
def test_one_step_of_sd15_to_sd_tiny(tmp_path):
    """Terms are finite, every student parameter learns, and the peak is what teacher, student and Adam take."""
    source = tmp_path / "sd15"
    subprocess.run([sys.executable, ROOT / "benchmarks/random_pipeline.py", "sd15", source], check=True)
    out = tmp_path / "tiny"
    command = [
        "distill",
        "tiny",
        "--model",
        source,
        "--data",
        "digits",
        "--resolution",
        "64",
        "--batch",
        "1",
        "--steps",
        "1",
        "--caption-dropout",
        "0",
        "--no-random-flip",
        "--sample-every",
        "0",
        "--log",
        "none",
        "--cache",
        "none",
        "--out",
        out,
    ]
    done = subprocess.run([sys.executable, "-c", MEASURED, *map(str, command)], capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["code"] == 0, done.stderr
    (line,) = [json.loads(text) for text in (tmp_path / "tiny-run/losses.jsonl").read_text().splitlines()]
    assert all(line[name] == line[name] and abs(line[name]) < 1e6 for name in ("task", "output", "feature"))
    checkpoint = tmp_path / "tiny-run/checkpoints/step-000001"
    weights = load_file(checkpoint / "unet/diffusion_pytorch_model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == 323_384_964 and len(weights) == 358
    moments = torch.load(checkpoint / "optimizer-unet.pt", weights_only=True)["state"]
    assert len(moments) == 358 and all((entry["exp_avg"] != 0).any() for entry in moments.values())
    teacher, student, rest = 4 * 859_520_964, 4 * 323_384_964, 4 * (123_060_480 + 83_653_863)
    floor = teacher + 4 * student + rest  # weights, gradients and two moments
    print(f"peak {result['peak'] / 1e9:.2f} GB, weights and optimizer {floor / 1e9:.2f} GB; {line}")
    assert result["peak"] < 1.35 * floor


DMD2_TURNS = """
import json, resource, sys
import torch
from accel.distill import recipes, settings
from accel.distill.data.encoders import Encoders
from accel.distill.few_step import memory
from accel.distill.few_step.dmd2 import DMD2
from accel.models.source import open_source

tiny, full = sys.argv[1:]
recipe = recipes.changed(settings.DMD2Recipe(), model=tiny, teacher=full, data="digits", resolution=64, batch=1)
parts = memory.predict(recipe, Encoders(open_source(tiny)), foreach=False).parts
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
method = DMD2(recipe, Encoders(open_source(tiny)))
method.place(torch.device("cpu"), torch.float32)
torch.manual_seed(0)
batch = {"index": [0], "latent_mean": torch.randn(1, 4, 8, 8), "latent_std": torch.rand(1, 4, 8, 8),
         "context": torch.randn(1, 77, 768)}
learnt = lambda module: sum(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())
count = lambda module: sum(1 for _ in module.parameters())
result = {}
for phase in method.phases:
    total, terms = method.loss(phase, batch, 0)
    total.backward()
    result[phase.name] = {name: learnt(getattr(method, name)) for name in ("generator", "critic", "teacher")}
    result[phase.name]["terms"] = {name: float(term) for name, term in terms.items()}
    method.generator.zero_grad(set_to_none=True)
    method.critic.zero_grad(set_to_none=True)
result["parameters"] = {name: count(getattr(method, name)) for name in ("generator", "critic", "teacher")}
result["head"] = sum(p.numel() for p in method.critic.head.parameters())
result["predicted"] = sum(parts[name] for name in ("weights that learn", "frozen weights", "gradients and activations"))
result["before"] = before
result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(result))
"""


@pytest.mark.slow
def test_one_iteration_of_dmd2_from_sd15_to_sd_tiny(tmp_path):
    """Each phase reaches all of its own network and nothing of the others; the teacher gets no gradient at all.

    And the memory is what `--plan` says; no optimizer takes part.
    """
    sources = []
    for name in ("sd15-tiny", "sd15"):
        sources.append(tmp_path / name)
        subprocess.run([sys.executable, ROOT / "benchmarks/random_pipeline.py", name, sources[-1]], check=True)
    command = [sys.executable, "-c", DMD2_TURNS, *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    parameters = result["parameters"]
    assert parameters["generator"] == 358 and parameters["teacher"] == 686
    for phase, learns in (("generator", "generator"), ("critic", "critic")):
        for name in ("generator", "critic", "teacher"):
            assert result[phase][name] == (parameters[name] if name == learns else 0), (phase, name)
        assert all(abs(value) < 1e6 for value in result[phase]["terms"].values())  # false for NaN
    print(f"peak {result['peak'] / 1e9:.2f} GB; {result}")
    assert result["peak"] - result["before"] == pytest.approx(result["predicted"], rel=0.1)
