"""What `make test-gpu` would run, read from the files of the tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PATHS = (
    "test_eager_in_float32_is_exact_there",
    "test_compile",
    "test_cuda_graphs_of_eager_make_the_same_image",
    "test_onnx_runtime_on_cuda",
    "test_kernels_there_equal_their_references",
    "test_the_bench_there",
    "test_a_step_of_training_with_the_kernels_there",
)


def marked(tree: ast.Module) -> set[str]:
    """The tests of a file that run on a GPU: all of them, or those whose decorators name the mark."""
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    names = {"pytest.mark.gpu"}
    for node in tree.body:
        if isinstance(node, ast.Assign) and "pytest.mark.gpu" in ast.unparse(node.value):
            target = ast.unparse(node.targets[0])
            if target == "pytestmark":
                return {test.name for test in tests}
            names.add(target)
    return {
        test.name for test in tests if any(name in ast.unparse(one) for one in test.decorator_list for name in names)
    }


def test_every_path_to_a_gpu_has_a_test_for_one():
    files = Path(__file__).parent.rglob("test_*.py")
    found = {path.name: marked(ast.parse(path.read_text())) for path in files}
    assert set(PATHS) <= found["test_torch_gpu.py"]
    assert len(found["test_tensorrt_gpu.py"]) > 3 and len(found["test_tensorrt_rtx_gpu.py"]) > 3


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("def test_a(): ...", set()),
        ("@pytest.mark.gpu\ndef test_a(): ...\ndef test_b(): ...", {"test_a"}),
        ("pytestmark = [pytest.mark.gpu]\ndef test_a(): ...", {"test_a"}),
    ],
)
def test_marks_are_read(code, names):
    assert marked(ast.parse(code)) == names
