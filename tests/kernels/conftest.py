"""The figures of benchmarks/kernels.py, made once: in Triton's interpreter, and by its compiler for GPUs."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/kernels.py"


@pytest.fixture(scope="session")
def figures():
    """figures("errors"), figures("cubins"): rows, see the script."""
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = {}

    def get(part):
        if part not in made:
            made[part] = script.part(part, **({"TRITON_INTERPRET": "1"} if part == "errors" else {}))
        return made[part]

    return get


@pytest.fixture
def module():
    """The module of an operation, whose public function has its name."""
    return lambda name: importlib.import_module(f"accel.kernels.{name}")
