"""Runs of several processes, under gloo."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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

# accelerate takes these under CUDA's process groups alone. The state that all its parts share gets what it would have
# there; the plugin, and everything after it, is the real thing. Networks that are not sharded end the run.
SHARDED = """
def as_on_gpus():
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor
    from accel.distill.training import loop

    made, run_all = AcceleratorState.__init__, loop.Loop.run_all

    def __init__(self, mixed_precision=None, *given, fsdp_plugin=None, **more):
        first = "_mixed_precision" not in AcceleratorState._shared_state
        made(self, mixed_precision, *given, fsdp_plugin=fsdp_plugin, **more)
        if first:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = self.distributed_type

    def checked(self, batches):
        for name, network in self.method.networks.items():
            assert all(isinstance(p, DTensor) for p in network.model.parameters()), name
        return run_all(self, batches)

    AcceleratorState.__init__, loop.Loop.run_all = __init__, checked
as_on_gpus()
"""


def launched() -> dict[str, str]:
    """What `accelerate launch` hands to its processes under FSDP2, by its own code."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    command = "--use_fsdp --fsdp_version 2 --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
    command += "train.py"
    args = launch_command_parser().parse_args(command.split())
    made = prepare_multi_gpu_env(args)
    return {name: value for name, value in made.items() if name.startswith("FSDP_") or name == "ACCELERATE_USE_FSDP"}


def launch(folder: Path, code: str, *arguments: Any, world: int = 2, sharded: bool = False, forked: bool = True) -> str:
    """Run code in that many processes; see `torchrun`."""
    script = folder / "script.py"
    script.write_text(SHARDED * sharded + code)
    elastic = ["-m", "torch.distributed.run", f"--nproc_per_node={world}", "--rdzv-backend=c10d"]
    launcher = ["-c", FORKED, str(world)] if forked else [*elastic, "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *map(str, arguments)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | (launched() if sharded else {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(code, *arguments, world=2, sharded=False, forked=True): run code in that many processes.

    Args of the call:
        sharded: with FSDP2, as `accelerate launch` sets it; every trained network is asserted to be sharded.
        forked: by a fork each, which is quick, instead of torchrun itself.

    Returns what they said, once all have succeeded.
    """
    return functools.partial(launch, tmp_path)
