"""What is said of a build that fails: the cause that TensorRT logged, and a fix that goes with it."""

from __future__ import annotations

import pytest

from accel.errors import UserError
from accel.export.tensorrt import compiler
from accel.export.tensorrt.build import build
from accel.export.tensorrt.options import BuildOptions
from accel.trt import engine_files, library
from accel.trt.flavours import RTX, TENSORRT_11
from accel.trt.library import Library, Messages

# What TensorRT-RTX 1.7.1 logs.
NO_DRIVER = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/common/dispatch/"
    "checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime version))"
)
NO_LEAN = "Unable to load library: libnvinfer_lean.so.1: cannot open shared object file: No such file or directory"


class Module:
    __version__ = "1.7.1.116"


def failed(errors, flavour=TENSORRT_11, targets=()) -> UserError:
    job = compiler.Job(flavour.engine, "unet", "unet/model.onnx", targets=list(targets))
    return compiler.failure(Library(Module, flavour), job, Messages(errors=list(errors)))


@pytest.mark.parametrize(
    "errors, flavour, targets, fix",
    [
        ([NO_LEAN, NO_DRIVER], TENSORRT_11, [], "leave out --version-compatible, or install TensorRT's lean runtime"),
        (["FP32 GEMM is not supported"], RTX, ["sm75"], "leave sm75 out of --targets"),
        (["FP32 GEMM is not supported"], RTX, ["sm89"], "a smaller --profile, or --components"),
        (["OutOfMemory"], RTX, [], "free memory of this machine"),
        (["OutOfMemory"], TENSORRT_11, [], "free GPU memory (see nvidia-smi)"),
    ],
)
def test_a_build_that_fails_is_told_with_the_fix_of_its_cause(errors, flavour, targets, fix):
    error = failed(errors, flavour, targets)
    assert fix in error.fix and errors[0] in error.message and "cudaError" not in error.message


@pytest.mark.parametrize(
    "errors, fix",
    [
        ([NO_DRIVER], "check the driver (nvidia-smi): loading an engine needs one"),
        ([NO_LEAN], "leave out --version-compatible"),
        (["Error Code 2: OutOfMemory (Requested size was 1 bytes)"], "free GPU memory"),
    ],
)
def test_an_engine_that_does_not_load_is_told_with_its_cause(errors, fix):
    error = compiler.not_deserialized(Library(Module, TENSORRT_11), "unet", Messages(errors=errors))
    assert fix in error.fix and "NVIDIA" not in error.fix


def test_an_option_that_a_setter_only_logs_stops_the_build(bundle, tensorrt):
    tensorrt._world.fail.add("config")
    with pytest.raises(UserError, match="does not take the options of this build of vae_decoder: .*poolSize"):
        build(bundle, ("vae_decoder",), options=BuildOptions(workspace=1 << 20))
    assert "build" not in tensorrt._world.calls and engine_files.find(bundle) == []


def test_what_is_logged_without_a_driver_is_no_cause():
    messages = Messages(errors=["the cause", NO_DRIVER, "--- Begin node ---"])
    assert messages.causes() == ["the cause"] and messages.causes(1) == []


@pytest.mark.skipif(
    library.installed(RTX.engine) is None or library.has_driver(), reason="of a machine without a driver"
)
def test_the_real_library_says_that_there_is_no_driver():
    """The bytes do not matter: without a driver no engine is read."""
    found = library.load(RTX.engine)
    with library.collect() as messages:
        runtime = found.module.Runtime(library.logger(found.module))
        assert runtime is None or runtime.deserialize_cuda_engine(b"no engine") is None
    assert "check the driver" in compiler.not_deserialized(found, "unet", messages).fix
