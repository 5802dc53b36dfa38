"""The machine record: complete, plain, anonymous, and without importing anything heavy."""

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from accel import machine as module
from accel.machine import Gpu, Machine, machine


def test_it_looks_at_this_machine():
    found = machine()
    assert isinstance(found, Machine) and found.cpu and found.python == platform.python_version()
    assert 1 <= found.threads <= os.cpu_count() and found.memory > 2**28
    assert found.packages["torch"] and found.packages["numpy"]
    assert found.os.endswith(platform.machine())


def test_it_is_plain_data():
    found = machine().as_dict()
    assert json.loads(json.dumps(found)) == found
    assert set(found["packages"]) == set(module.PACKAGES)


def test_no_host_no_user_no_path():
    text = json.dumps(machine().as_dict())
    secrets = {platform.node(), getpass.getuser(), str(Path.home()), str(Path.cwd()), sys.prefix}
    for secret in secrets:
        # A one-word name like "root" or "main" may be part of an ordinary word.
        assert len(secret) < 5 or secret not in text
    assert "/home" not in text and "/usr" not in text


def test_absent_packages_are_none(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ("numpy", "surely-not-installed"))
    packages = machine().packages
    assert packages["surely-not-installed"] is None and packages["numpy"][0].isdigit()


def test_cpuinfo_is_read_from_its_first_block(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Chip: A\nflags\t\t: avx2 xyz\n\nprocessor\t: 1\nmodel name\t: B\n")
    info = module._cpuinfo(file)
    assert info["model name"] == "Chip: A" and info["processor"] == "0"
    assert module._cpuinfo(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("flags", "saturates"),
    [("fma avx2", True), ("avx2 avx_vnni", False), ("avx2 avx512_vnni", False), ("asimd", False), ("", False)],
)
def test_int8_saturates_on_avx2_without_vnni(monkeypatch, flags, saturates):
    monkeypatch.setattr(module, "_cpuinfo", lambda: {"flags": flags})
    assert module.int8_saturates() == saturates


def test_isa_flags_are_those_of_interest(monkeypatch):
    monkeypatch.setattr(module, "_cpuinfo", lambda: {"flags": "amx_bf16 sse2 avx512f", "model name": "X"})
    assert machine().isa == ("avx512f", "amx_bf16")
    monkeypatch.setattr(module, "_cpuinfo", lambda: {"Features": "asimd bf16"})
    assert machine().isa == ("asimd", "bf16")
    monkeypatch.setattr(module, "_cpuinfo", dict)
    assert machine().isa == () and machine().cpu


@pytest.mark.parametrize("text, limit", [("max\n", None), ("1073741824\n", 2**30)])
def test_the_containers_limit(tmp_path, text, limit):
    (tmp_path / "memory.max").write_text(text)
    assert module._container_memory(tmp_path / "memory.max") == limit
    assert module._container_memory(tmp_path / "none") is None


def test_memory_is_the_containers_where_that_is_less(monkeypatch):
    monkeypatch.setattr(module, "_container_memory", lambda: 12345)
    assert machine().memory == 12345


def test_gpus_are_parsed():
    table = "NVIDIA H100 80GB HBM3, 81559, 9.0, 550.54.15\nNVIDIA GB10, [N/A], 12.1, 580.1\n\nnonsense\n"
    assert module._parse_gpus(table) == (
        Gpu(name="NVIDIA H100 80GB HBM3", memory=81559 * 2**20, compute_capability="9.0", driver="550.54.15"),
        Gpu(name="NVIDIA GB10", memory=None, compute_capability="12.1", driver="580.1"),
    )


def test_a_broken_nvidia_smi_means_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert module._gpus() == ()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'driver mismatch'\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setattr(module.shutil, "which", lambda name: str(program))
    assert module._gpus() == ()


def test_without_torch_and_without_importing_any_engine():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from accel.bench.roofline import machine\n"
        "assert machine().packages['torch']\n"
        "assert not {'diffusers', 'transformers', 'onnxruntime', 'openvino', 'tensorrt'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
