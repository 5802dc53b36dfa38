"""Whatever the environment does to the command line, it ends in a sentence: no traceback, no claim of a bug."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from accel.files import cache_dir

ACCEL = f"{sys.executable} -m accel"
BUNDLE = "digits/tiny-1step-int8"
RUN = f"run {BUNDLE} --prompt seven --engine onnxruntime --threads 1 --out"


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    found = {key: value for key, value in (os.environ | environment).items() if value != "UNSET"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=found, capture_output=True, timeout=120)
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert "Traceback" not in said and "bug in accel" not in said and "Exception ignored" not in said, said
    return done


CASES = {
    "closed stdout": (f"{ACCEL} inspect {BUNDLE} >&-", 0),
    "closed stderr": (f"{ACCEL} inspect {BUNDLE} 2>&-", 0),
    "full stdout": (f"{ACCEL} inspect {BUNDLE} > /dev/full", 1),
    "full stdout, json": (f"{ACCEL} inspect {BUNDLE} --json > /dev/full", 1),
    "a name that is not UTF-8": (f"mkdir $'a\\xff'; {ACCEL} inspect $'a\\xff'", 1),
    "a name that is not UTF-8, json": (f"cp -r ../bundle $'b\\xff'; {ACCEL} inspect $'b\\xff' --json", 0),
    "an image whose name is not UTF-8": (f"{ACCEL} {RUN} $'c\\xff.png' && ls", 0),
    "a zero byte cannot be typed, but a very long name": (f"{ACCEL} inspect {'x' * 5000}", 1),
    "a folder as a file": (f"{ACCEL} inspect /dev/null", 1),
    "an image to a full disk": (f"ulimit -f 0; {ACCEL} {RUN} out.png", 1),
    "an image into nothing": (f"{ACCEL} {RUN} /proc/nothing/out.png", 1),
    "ascii alone": (f"mkdir ä; LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=ascii {ACCEL} inspect ä", 1),
    "no home": (f"env -u HOME -u XDG_CACHE_HOME -u ACCEL_CACHE {ACCEL} inspect {BUNDLE}", 0),
    "a cache that is a file": (f"touch c; ACCEL_CACHE=$PWD/c {ACCEL} {RUN} out.png", 0),
    "a cache that is a file, openvino": (
        f"touch c; ACCEL_CACHE=$PWD/c {ACCEL} {RUN.replace('onnxruntime', 'openvino')} out.png",
        0,
    ),
    "a cache of another shape": (f"mkdir c; touch c/verified; ACCEL_CACHE=$PWD/c {ACCEL} {RUN} out.png", 0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_environment_ends_in_a_sentence(bundle, tmp_path, name):
    command, code = CASES[name]
    folder = tmp_path / "place" / "here"
    folder.mkdir()
    if "openvino" in name:
        pytest.importorskip("openvino")
    assert shell(command, folder).returncode == code


def test_a_user_without_a_home_whom_the_system_does_not_know(monkeypatch):
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.delenv("ACCEL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir().name == f"accel-{os.getuid()}"
