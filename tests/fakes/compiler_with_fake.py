"""The compiler's child process with a fake TensorRT in it: `python compiler_with_fake.py VERSION STEPS SECONDS`.

STEPS steps of progress, of SECONDS each; a negative number of steps crashes in the first one, as a library may.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path


def _fake(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main(version: str, steps: int, seconds: float) -> None:
    fakes = [_fake("tensorrt"), _fake("cuda")]
    from accel.export.tensorrt import child, compiler

    def on_step(step: int) -> None:
        if steps < 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(seconds)

    module = fakes[0].make(version)
    module._world.steps, module._world.on_step = abs(steps), on_step
    sys.modules["tensorrt"], compiler.Cuda = module, fakes[1].Cuda
    compile_graph = compiler.compile_graph

    def compile_to_bytes(job, progress):
        done = compile_graph(job, progress)
        return replace(done, data=bytes(done.data))  # the fake's memory is no buffer

    child.compile_graph = compile_to_bytes
    child.main()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
