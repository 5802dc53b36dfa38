"""Runs of several processes, under gloo."""

import os
import subprocess
import sys

import pytest

# What torchrun does on one machine, but for the packages: they are imported once, before the processes part.
FORKED = """
import os, signal, socket, sys, traceback
import accel.distill.run, accel.distill.training.loop, diffusers, transformers
world, script, *arguments = sys.argv[1:]
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
children = []
for rank in range(int(world)):
    child = os.fork()
    if child:
        children.append(child)
        continue
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world,
                       MASTER_ADDR="localhost", MASTER_PORT=str(port))
    sys.argv = [script, *arguments]
    try:
        exec(compile(open(script).read(), script, "exec"), {"__name__": "__main__"})
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)
while children:
    child, code = os.wait()
    children.remove(child)
    if code:  # the others wait for it
        for other in children:
            os.kill(other, signal.SIGKILL)
        sys.exit(1)
"""

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
    """torchrun(code, *arguments, world=2, sharded=False, forked=True): run code in that many processes.

    Args of the call:
        sharded: with FSDP2.
        forked: by a fork each, which is quick, instead of torchrun itself.

    Returns what they said, once all have succeeded.
    """

    def run(code: str, *arguments, world: int = 2, sharded: bool = False, forked: bool = True) -> str:
        script = tmp_path / "script.py"
        script.write_text(SHARDED * sharded + code)
        elastic = ["-m", "torch.distributed.run", f"--nproc_per_node={world}", "--rdzv-backend=c10d"]
        launcher = ["-c", FORKED, str(world)] if forked else [*elastic, "--rdzv-endpoint=localhost:0"]
        done = subprocess.run(
            [sys.executable, *launcher, str(script), *map(str, arguments)],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run
