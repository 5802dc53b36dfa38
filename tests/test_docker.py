"""The steps of the Docker files: their files make a wheel, what they install exists, who runs them may write."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("Dockerfile*"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def steps(file: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined."""
    text = re.sub(r"\\\n", " ", file.read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def installs(file: Path) -> tuple[list[str], list[str]]:
    """Packages of apt, and words of pip's command line."""
    runs = [text for name, text in steps(file) if name == "RUN"]
    apt = next(part for text in runs for part in text.split("&&") if "apt-get install" in part)
    pip = next(text for text in runs if text.startswith("pip install"))
    return [word for word in shlex.split(apt)[2:] if not word.startswith("-")], shlex.split(pip)


def test_both_are_read():
    assert [file.name for file in FILES] == ["Dockerfile", "Dockerfile.cpu"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_torch_compile_has_a_compiler_and_header_files(file):
    (base,) = [text for name, text in steps(file) if name == "FROM"]
    packages, _ = installs(file)
    assert "g++" in packages
    assert "python3-dev" in packages or base.startswith("python:")  # whose Python has its header files


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_versions_are_pinned_and_extras_exist(file):
    _, pip = installs(file)
    assert pip[pip.index("--constraint") + 1] == "constraints.txt" and pip[-1] == ".[${EXTRAS}]"
    order = [name if name != "COPY" else text for name, text in steps(file)]
    (extras,) = [text.removeprefix("EXTRAS=") for name, text in steps(file) if text.startswith("EXTRAS=")]
    assert order.index("ARG") < len(order) - 1 - order[::-1].index("RUN")
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE), extra


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_user_without_privileges_runs_it_and_may_write(file):
    names = [name for name, _ in steps(file)]
    made = " ".join(text for name, text in steps(file) if name == "RUN" and "useradd" in text)
    assert "--uid 1000" in made and "/out" in made and "/home/accel/.cache" in made
    assert ("userdel" in made) == ("ubuntu24" in dict(steps(file))["FROM"])  # whose own user has uid 1000
    assert dict(steps(file))["USER"] == "accel" and names.index("USER") > max(
        i for i, name in enumerate(names) if name == "RUN"
    )
    assert dict(steps(file))["WORKDIR"] == "/home/accel"  # the last one: outside the source tree


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_commands_in_their_first_lines_keep_cache_and_output(file):
    head = file.read_text().split("FROM")[0]
    build, run = (next(line for line in head.splitlines() if f"docker {verb}" in line) for verb in ("build", "run"))
    assert f"-f docker/{file.name} " in build and build.rstrip().endswith(" .")
    assert "mkdir -p out" in run and ":/out" in run and "accel-cache:/home/accel/.cache" in run


def test_a_wheel_can_be_built_from_what_is_copied(tmp_path):
    pytest.importorskip("setuptools")
    copied = {}
    for file in FILES:
        copied[file.name] = [shlex.split(text) for name, text in steps(file) if name == "COPY"]
    assert copied["Dockerfile"] == copied["Dockerfile.cpu"]
    source = tmp_path / "opt"
    source.mkdir()
    for *names, target in copied["Dockerfile"]:
        for name in names:
            here, there = ROOT / name, source / (name if target == "./" else target)
            if here.is_dir():
                shutil.copytree(here, there, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(here, there)
    command = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", command], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(ZipFile(wheel).namelist())
    assert {"accel/cli.py", "accel/export/pipeline.py", "accel/distill/run.py", "accel/kernels/geglu.py"} <= names
    assert any(name.startswith("accel/assets/") for name in names)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_for_cpus_is_built_and_draws(tmp_path):
    """Every step of it but its FROM; where its tools or root's rights are missing, nothing can be said."""
    if os.geteuid() or not (shutil.which("buildah") and shutil.which("debootstrap")):
        pytest.skip("needs root, buildah and debootstrap (apt-get install buildah debootstrap)")
    wheels = [path for path in os.environ.get("PIP_FIND_LINKS", "").split() if Path(path).is_dir()]
    command = ["sh", str(ROOT / "docker" / "rehearse.sh"), str(tmp_path / "rehearsal"), *wheels[:1]]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert re.search(r"1000 +1000 .* seven\.png", done.stdout) and "built and run" in done.stdout
    finally:
        shutil.rmtree(tmp_path / "rehearsal", ignore_errors=True)
