"""What a wheel would contain is what the tree contains."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"accel": "accel", "export": "accel.export", "distill": "accel.distill", "kernels/ops": "accel.kernels"}


def declared_packages() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    (names,) = re.findall(r"^packages = \[(.*?)\]", text, flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r'"([\w.]+)"', names))


def test_every_package_of_the_tree_is_declared():
    found = set()
    for folder, name in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join([name, *inner]))
    assert found == declared_packages()


def test_type_checkers_are_told_that_the_package_has_types():
    assert (ROOT / "accel" / "py.typed").is_file()  # one at the top counts for what lies below
    assert '"accel" = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()


def test_what_is_type_checked_exists():
    text = (ROOT / "pyproject.toml").read_text()
    (files,) = re.findall(r"^\[tool.mypy\]\nfiles = \[(.*?)\]", text, flags=re.MULTILINE | re.DOTALL)
    names = re.findall(r'"(.*?)"', files)
    assert {"accel/__init__.py", "accel/bundle/", "export/pipeline.py"} <= set(names)
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_python_versions_and_pins_agree():
    pyproject, pins = (ROOT / "pyproject.toml").read_text(), (ROOT / "constraints.txt").read_text()
    assert 'requires-python = ">=3.10"' in pyproject and "torch==2.13.0" in pins
    assert "torchvision" not in pins and "torchaudio" not in pins
    hard = pyproject.split("[project.optional-dependencies]")[0]
    for name in ("torchvision", "onnxruntime", "tensorrt", "flash-attn", "xformers"):
        assert f'"{name}' not in hard  # GPU packages are extras; the two onnxruntimes exclude each other


def test_the_licence_and_the_attribution_of_the_shipped_models_go_into_the_wheel():
    text = (ROOT / "pyproject.toml").read_text()
    (files,) = re.findall(r"^license-files = \[(.*?)\]", text, flags=re.MULTILINE)
    assert 'license = "Apache-2.0"' in text and re.findall(r'"(.*?)"', files) == ["LICENSE", "accel/assets/NOTICE"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "CC BY 4.0" in (ROOT / "accel/assets/NOTICE").read_text()
    for dockerfile in (ROOT / "docker").glob("Dockerfile*"):
        assert "LICENSE" in dockerfile.read_text(), dockerfile  # the build refuses to go without the files it names
