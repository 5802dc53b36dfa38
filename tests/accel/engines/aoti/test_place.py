"""What a package of AOTInductor is bound to, and how each misfit is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accel.engines.aoti import place
from accel.engines.aoti.place import Here
from accel.errors import UserError
from accel.machine import instruction_sets
from accel.trt.engine_files import EngineFile

CPU = Here("2.13.0+cpu", "cpu", ("avx2", "avx512f", "fma"))
GPU = Here("2.13.0+cu130", "cuda", (), "NVIDIA L4", "8.9", index=1)


def built(here: Here) -> EngineFile:
    return EngineFile(Path("unet.pt2"), {"identity": here.identity() | {"options": {}}}, b"")


def test_it_runs_where_it_was_built_and_on_a_processor_that_has_more():
    assert CPU.refuses(built(CPU)) == "" == GPU.refuses(built(replace(GPU, index=0)))
    assert replace(CPU, isa=(*CPU.isa, "avx512_bf16")).refuses(built(CPU)) == ""


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        (replace(CPU, torch="2.14.0"), "it was built with torch 2.13.0+cpu, here is 2.14.0"),
        (replace(CPU, isa=("avx2",)), "it was built for a processor with avx512f, fma, which this one lacks"),
        (replace(CPU, platform="Linux aarch64"), "this is Linux aarch64"),
        (replace(GPU, torch=CPU.torch), "it was built for the CPU, and this is to run on NVIDIA L4"),
    ],
)
def test_what_differs_is_named(here, reason):
    assert reason in here.refuses(built(CPU))


def test_code_for_another_gpu_is_refused():
    other = replace(GPU, gpu="NVIDIA H200", compute_capability="9.0")
    assert other.refuses(built(GPU)) == "it was built for NVIDIA L4 (8.9), here is NVIDIA H200 (9.0)"
    assert CPU.refuses(built(replace(GPU, torch=CPU.torch))).startswith("it was built for NVIDIA L4")


def test_here_is_this_processor_and_a_gpu_that_is_not_there_is_refused():
    here = place.here("cpu")
    assert here == Here(torch.__version__, "cpu", instruction_sets()) and here.place == "cpu"
    assert place.here("npu") is None and replace(GPU).place == "cuda:1"
    if not torch.cuda.is_available():
        assert place.here("auto") == here
        with pytest.raises(UserError, match="torch sees no CUDA device"):
            place.here("cuda:1")
