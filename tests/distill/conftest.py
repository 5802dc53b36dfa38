"""Runs of several processes, under gloo."""

import os
import subprocess
import sys

import pytest

# accelerate's own launcher knows FSDP on GPUs only; the plugin and everything after it is the real thing.
SHARDED = """
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accel.distill import run
made = run.accelerator_for
def accelerator_for(recipe, folder):
    accelerator = made(recipe, folder)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BasicTransformerBlock", "ResnetBlock2D"])
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator
run.accelerator_for = accelerator_for
"""


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(code, *arguments, world=2, sharded=False): run code in that many processes, with FSDP2 if asked for.

    Returns what they said, once all have succeeded.
    """

    def run(code: str, *arguments, world: int = 2, sharded: bool = False) -> str:
        script = tmp_path / "script.py"
        script.write_text(SHARDED * sharded + code)
        launcher = [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={world}",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
        ]
        done = subprocess.run(
            [sys.executable, *launcher, str(script), *map(str, arguments)],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run
