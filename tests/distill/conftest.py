"""Runs of several processes, under gloo."""

import os
import subprocess
import sys

import pytest


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(code, *arguments, world=2): run code in that many processes; what they said, once all have succeeded."""

    def run(code: str, *arguments, world: int = 2) -> str:
        script = tmp_path / "script.py"
        script.write_text(code)
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={world}", "--rdzv-backend=c10d",
                    "--rdzv-endpoint=localhost:0"]  # fmt: skip
        done = subprocess.run(
            [sys.executable, *launcher, str(script), *map(str, arguments)],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run
