"""Two processes train as one does with the joint batch, sharded or not; and what FSDP cannot take is said first."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from accel.distill.run import execute
from accel.errors import UserError

ROOT = Path(__file__).parents[3]
WAYS = {  # wrapper -> the methods whose two runs are compared here; `benchmarks/two_processes.py` has all of them
    "ddp": ("dmd2, GAN", "dmd2, pair of LoRAs"),
    "fsdp2": ("kd", "dmd2", "dmd2, GAN", "dmd2, GAN, EDM", "dmd2, GAN, bf16", "regress"),
}


@pytest.fixture(scope="module")
def measure():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        spec = importlib.util.spec_from_file_location("two_processes", ROOT / "benchmarks" / "two_processes.py")
        module = sys.modules["two_processes"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


@pytest.fixture(scope="module")
def models(measure, sd15, small, tmp_path_factory):
    return {"sd15": sd15, "small": small, "edm": measure.make_edm(tmp_path_factory.mktemp("models") / "edm")}


@pytest.fixture(scope="module")
def one(measure, models, tmp_path_factory):
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("one")
    torch.set_num_threads(1)
    measure.alone(models, folder, sorted({name for names in WAYS.values() for name in names}))
    return folder


@pytest.mark.parametrize("wrapper", WAYS)
def test_two_processes_train_as_one_with_the_joint_batch(measure, models, one, tmp_path, torchrun, wrapper):
    names = list(WAYS[wrapper])
    measure.together(models, tmp_path, torchrun, names, sharded=wrapper == "fsdp2")
    for name in names:
        figures, weights = measure.differences(one / f"{name}-run", tmp_path / f"{name}-run")
        exact = "bf16" not in name
        assert name != "kd" or "validation/loss" in (tmp_path / f"{name}-run" / "losses.jsonl").read_text()
        assert figures <= (3e-6 if exact else 3e-2), (name, figures)
        assert weights <= (1e-5 if exact else 0.2), (name, weights)


@pytest.mark.parametrize("method", ["kd", "dmd2, pair of LoRAs"])
def test_fsdp_that_would_not_be_in_effect_is_refused(measure, models, tmp_path, monkeypatch, method):
    """As `accelerate launch --use_fsdp` on CPUs, or with one process that no launcher started."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP was asked for, and accelerate shards nothing here"):
        execute(measure.recipe_of(method, models), tmp_path / "out")
    assert not (tmp_path / "out-run").exists()


REFUSED = """
import json, os, sys
from pathlib import Path
from accel.distill import run, settings
from accel.errors import UserError
os.environ |= json.loads(sys.argv[3])
try:
    run.execute(settings.DMD2Recipe(**eval(sys.argv[1])), Path(sys.argv[2]))
except UserError as error:
    print(error, file=sys.stderr)
else:
    raise AssertionError("not refused")
assert not (Path(sys.argv[2] + "-run") / "pairs").exists()
"""


@pytest.mark.parametrize(
    ("fields", "environment", "said"),
    [
        (dict(rank=2, critic_rank=2), {}, "FSDP cannot shard a network that several updates share"),
        (
            {},
            {"FSDP_VERSION": "1", "FSDP_SYNC_MODULE_STATES": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"},
            "add --fsdp_version 2",
        ),
        ({}, {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaLayer"}, "no network of this run has a LlamaLayer"),
    ],
    ids=["shared", "first version", "blocks"],
)
def test_what_fsdp_cannot_take_is_refused(small, tmp_path, torchrun, fields, environment, said):
    common = dict(model=str(small), data="digits", resolution=64, cache="none", log="none")
    given = repr(common | fields)
    assert said in torchrun(REFUSED, given, tmp_path / "out", json.dumps(environment), world=1, sharded=True)
