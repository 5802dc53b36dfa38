"""The eleven faults that reading found in the CUDA paths, each shown on a CPU, on the commit before they were mended.

    python benchmarks/gpu_faults.py out/before-gpu --write       # a few minutes, no GPU

`out/before-gpu` becomes a checkout of that commit. Each probe is the essence of a test of today, run on the code of
then; where a device would answer, what its library says is put in its place. `--write` makes `gpu-faults.json` and the
table of `docs/gpu.md`. A probe that finds no fault fails.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import earlier_commit

PROVIDERS, MEASURE = "tests/accel/providers/test_gpu.py", "tests/accel/bench/test_measure.py"

# Number -> what was wrong, and the tests that show it.
KNOWN = {
    1: (
        "`[cuda]` installed with pip alone cannot load ONNX Runtime's CUDA provider",
        [
            f"{PROVIDERS}::test_libraries_are_loaded_before_the_first_session_and_torch_first",
            f"{PROVIDERS}::test_the_extras_bring_what_the_providers_need",
        ],
    ),
    2: (
        "`auto` dies where CUDA is listed and does not run",
        [f"{PROVIDERS}::test_auto_takes_the_cpu_where_cuda_is_listed_and_does_not_run"],
    ),
    3: (
        "TensorRT 11 beside a provider that is linked to 10",
        [f"{PROVIDERS}::test_the_tensorrt_that_the_provider_is_linked_to_is_read_from_it"],
    ),
    4: (
        "graphs over 2 GB on the TensorRT provider",
        ["tests/accel/providers/test_built_in.py::test_the_chain_falls_to_cuda_and_cpu_and_own_options_win"],
    ),
    5: ("the reference of parity in TF32", ["tests/accel/trt/test_tf32.py::test_the_reference_is_float32_on_cuda"]),
    6: (
        "torch.compile without Python's header files",
        [
            "tests/test_docker.py::test_torch_compile_has_a_compiler_and_header_files",
            "tests/accel/engines/test_compile.py::test_header_files_of_python_are_looked_for",
        ],
    ),
    7: (
        "no share of the peak for TensorRT",
        [f"{MEASURE}::test_the_share_of_the_peak_goes_by_the_device_and_not_by_its_description"],
    ),
    8: (
        "device and dtype frozen at attach; the caller's current device changed",
        [
            "tests/accel/attaching/test_attached.py::test_a_stand_in_is_where_its_original_is_now",
            "tests/accel/engines/test_torch_graphs.py::test_the_current_device_of_the_caller_stays",
        ],
    ),
    9: (
        "the bench holds every variant at once, and an overflow loses the row",
        [
            f"{MEASURE}::test_variants_that_do_not_fit_together_are_loaded_one_after_another",
            f"{MEASURE}::test_a_decoder_that_overflows_costs_its_own_scopes_and_not_the_row",
        ],
    ),
    10: ("next to no test for a GPU", ["tests/test_gpu_marks.py::test_every_path_to_a_gpu_has_a_test_for_one"]),
    11: (
        "flash-attn 4 taken for flash-attn 2",
        ["tests/accel/attention/test_attention.py::test_flash_attn_4_alone_is_not_flash_attn_2"],
    ),
}


# What follows runs on the code of then.


def _preload(work: Path) -> str:
    ort = _lists_cuda()
    order: list[str] = []
    ort.preload_dlls = lambda *_, **__: order.append("preload")

    def opened(*_: Any, **__: Any) -> Any:
        order.append("session")
        raise RuntimeError("a session")

    ort.InferenceSession = opened
    earlier_commit.error(lambda: _engine(work, provider="cuda"))
    assert order == ["session"]
    (extra,) = re.findall(r"^cuda = .*?(onnxruntime-gpu[^\"]*)", Path("pyproject.toml").read_text(), re.M)
    assert "[cuda" not in extra
    return f"a session is opened, and no library of CUDA was loaded before; the extra is {extra}, without them"


def _auto(work: Path) -> str:
    _lists_cuda()
    return earlier_commit.error(lambda: _engine(work))


def _linked(work: Path) -> str:
    """A provider that needs libnvinfer.so.10, and TensorRT 11.4."""
    from accel.providers import route
    from accel.trt import library

    (work / "capi").mkdir(exist_ok=True)
    (work / "capi/libonnxruntime_providers_tensorrt.so").write_bytes(b"\x7fELF..\0libnvinfer.so.10\0")
    ort = _lists_cuda()
    ort.__file__ = str(work / "__init__.py")
    library.installed = lambda *_: "11.4.0.106"  # type: ignore[assignment]
    bundle = _bundle(work)
    found = route.find("tensorrt", "auto", bundle, bundle.component("text_encoder"))
    (extra,) = re.findall(r'^tensorrt = \["(.*)"\]', Path("pyproject.toml").read_text(), re.M)
    assert found.name == "tensorrt" and "<11" not in extra
    return f"the provider needs libnvinfer.so.10, 11.4 is installed, and {found.name} is taken; the extra is {extra}"


def _initializers(work: Path) -> str:
    from accel.providers import built_in

    bundle = _bundle(work)
    options = built_in.tensorrt(0, bundle, bundle.component("text_encoder"))
    assert "trt_load_user_initializer" not in options
    return f"none of its {len(options)} options lets the provider read weights beside the graph"


def _tf32(work: Path) -> str:
    import numpy as np
    import torch

    import accel

    engine = accel.load_engine(_bundle(work), "text_encoder", "eager")
    seen: list[bool] = []
    engine.module.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    engine(input_ids=np.zeros((1, 77), np.int64))
    assert seen == [True]
    return "eager in float32 runs with torch.backends.cudnn.allow_tf32 = True"


def _headers(work: Path) -> str:
    import sysconfig

    from accel.engines import compile as engine

    sysconfig.get_paths = lambda *_, **__: {"include": str(work / "nothing")}  # type: ignore[assignment]
    sysconfig.get_path = lambda *_, **__: str(work / "nothing")  # type: ignore[assignment]
    packages = re.findall(r"python3-dev", Path("docker/Dockerfile").read_text())
    assert engine.status().ok and not packages
    return "docker/Dockerfile installs no python3-dev, and the engine's status is ok without header files"


def _peak(work: Path) -> str:
    from accel import bench
    from accel.bench import facts
    from accel.bench.state import State

    state = State(_bundle(work), [bench.parse("tensorrt")], bench.BenchSettings())
    state.environment = {"device": "cuda", "peak_flop_per_s": {"float32": 1e12}}
    state.descriptions["tensorrt"] = "tensorrt 10.16, NVIDIA H200, profiles 512px"
    state.samples, state.flops = {"unet": {"tensorrt": [1.0]}}, {"unet": {"total": int(5e11)}}
    found = facts._scope(state, state.variants[0], "unet")
    assert found.flop_per_s and found.peak_fraction is None
    return "0.5 TFLOP in a second of a peak of 1 TFLOP/s: its share is None"


def _frozen(work: Path) -> str:
    import torch

    from accel.attaching.stand_ins import Compiled
    from accel.trt import cuda

    class Network(torch.nn.Linear):
        config = None
        dtype = property(lambda self: self.weight.dtype)
        device = property(lambda self: self.weight.device)

    original = Network(2, 2)
    stand_in = Compiled(original, types.SimpleNamespace())  # type: ignore[arg-type]
    original.to(torch.float64)
    assert stand_in.dtype == torch.float32
    current: list[int] = []
    torch.cuda.set_device = current.append  # type: ignore[assignment]
    device = cuda.Cuda.__new__(cuda.Cuda)
    device.index = 1
    device.activate()
    assert current == [1] and "set_device" in inspect.getsource(cuda.Cuda.activate)
    return "the original is moved to float64, and its stand-in says float32; a call on cuda:1 makes it the caller's too"


def _bench(work: Path) -> str:
    from accel import bench
    from accel.bench import variants
    from accel.errors import UserError

    held: list[str] = []
    broken = "eager:fp16"

    class Overflows:
        def __init__(self, pipeline: Any):
            self.pipeline = pipeline

        def __call__(self, **call: Any) -> Any:
            raise UserError("the image is NaN or infinite (vae_decoder: float16)", "dtype fp32")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.pipeline, name)

    def load(bundle: Any, variant: Any) -> Any:
        made = variants.load(bundle, variant)
        held.append(variant.name)
        close = made.close
        made.close = lambda: (held.remove(variant.name), close())
        return Overflows(made) if variant.name == broken else made

    chosen = [bench.parse(name) for name in ("eager", "onnxruntime", broken)]
    settings = bench.BenchSettings(rounds=1, memory=False, steps=1)
    document = bench.measure(_bundle(work), chosen, settings, load=load).document.as_dict()
    (row,) = (row for row in document["rows"] if row["variant"] == broken)
    measured = [scope for scope, found in row["scopes"].items() if found["timing"]]
    assert len(set(held)) == 3 and not measured
    return f"{len(set(held))} of 3 variants are loaded at the end; {broken}: {row['reason']}, no network of it is timed"


def _tests(work: Path) -> str:
    marked = [
        path
        for path in Path("tests").rglob("test_*.py")
        if re.search(r"@pytest\.mark\.gpu|^pytestmark.*mark\.gpu", path.read_text(), re.M)
    ]
    assert len(marked) == 2
    return f"{', '.join(sorted(path.name for path in marked))}: no other file has one"


def _flash(work: Path) -> str:
    """flash-attn 4 alone makes the package `flash_attn`."""
    import torch

    from accel.distill.training.attention import FlashAttention, check_attention

    (work / "packages/flash_attn/cute").mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(work / "packages"))
    check_attention("flash-attn", device=torch.device("cuda"), half=True)
    try:
        FlashAttention()(None, torch.zeros(1, 1, 1))
    except ImportError as error:
        return f"flash-attn is taken, and the first forward fails: {str(error).partition(' (')[0]}"
    raise AssertionError("it ran")


PROBES: dict[int, Callable[[Path], str]] = {
    1: _preload,
    2: _auto,
    3: _linked,
    4: _initializers,
    5: _tf32,
    6: _headers,
    7: _peak,
    8: _frozen,
    9: _bench,
    10: _tests,
    11: _flash,
}


def _lists_cuda() -> Any:
    """ONNX Runtime as a build with the GPU providers, on a machine where they have no libraries."""
    import onnxruntime as ort

    from accel.providers.built_in import PROVIDERS as known

    ort.get_available_providers = lambda: list(known.values())
    return ort


def _bundle(work: Path) -> Any:
    return earlier_commit.exported(work, "digits", "digits/tiny", "--profile", "digits")


def _engine(work: Path, **options: Any) -> Any:
    import accel

    return accel.load_engine(_bundle(work), "text_encoder", "onnxruntime", **options)


FAULTS = earlier_commit.Faults(Path(__file__), "e2828f2", KNOWN, PROBES, earlier_commit.ROOT / "docs" / "gpu.md")


def facts() -> dict[str, Any]:
    from accel.machine import machine_name

    names = ("torch", "diffusers", "transformers", "onnxruntime")
    return {"machine": machine_name(), "versions": {name: version(name) for name in names}}


if __name__ == "__main__":
    earlier_commit.run(FAULTS, earlier_commit.parser(__doc__).parse_args(), facts=facts)
