"""Plugin providers: real libraries as far as this machine lets them come, and the choice of devices on a fake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import accel
from accel.bundle import Bundle
from accel.cli import main
from accel.engines import choose, onnxruntime, status
from accel.errors import Notice, UserError
from accel.providers import plugins, tensorrt_rtx
from accel.trt import library

RTX, TEXT = "tensorrt-rtx", "text_encoder"
NVIDIA = plugins.PACKAGED[RTX]
needs_nvidia = pytest.mark.skipif(find_spec(NVIDIA.module) is None, reason=NVIDIA.install)
needs_webgpu = pytest.mark.skipif(
    find_spec("onnxruntime_ep_webgpu") is None, reason="pip install onnxruntime-ep-webgpu"
)


@pytest.fixture
def bundle(smallest_bundle, monkeypatch, tmp_path) -> Bundle:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    return Bundle.open(smallest_bundle)


@pytest.fixture
def fake(fakes, monkeypatch, tmp_path):
    """fake(offers, **world): a library file whose provider is a fake."""
    monkeypatch.setattr(plugins, "_registered", {})
    module = fakes("onnxruntime_plugin")

    def make(*offers, **more):
        world = module.World([module.device(*offer) for offer in offers], **more)
        module.install(monkeypatch, world)
        world.path = tmp_path / "libfake.so"
        world.path.touch()
        return world

    return make


def load(bundle, provider, **options):
    return accel.load_engine(bundle, TEXT, "onnxruntime", provider=str(provider), **options)


IDS = {"input_ids": np.arange(77, dtype=np.int64)[None] % 50}


# Real libraries


@needs_nvidia
def test_nvidias_real_library_is_registered_or_says_what_is_missing(bundle, tmp_path):
    """With a driver this goes as far as the card; without one the library itself does not load."""
    if library.has_driver():
        pytest.skip("there is a driver here: tests/accel/engines/test_tensorrt_rtx_gpu.py")
    with pytest.raises(
        UserError, match="provider tensorrt-rtx cannot be used here: there is no NVIDIA driver .libcuda"
    ):
        load(bundle, RTX)
    with pytest.raises(UserError) as caught:  # and again: what failed is not taken for registered
        load(bundle, RTX)
    assert "NVIDIA's driver" in caught.value.fix and "--provider cpu" in caught.value.fix


@needs_nvidia
def test_without_a_driver_doctor_says_so_and_auto_goes_on(bundle, capsys):
    if library.has_driver():
        pytest.skip("there is a driver here")
    assert status("onnxruntime").ok and "tensorrt-rtx is installed but cannot run: there is no NVIDIA driver" in (
        status("onnxruntime").detail
    )
    assert "tensorrt-rtx does not run: there is no NVIDIA driver" in onnxruntime.attempt()
    assert choose("auto", bundle.component(TEXT), bundle) != RTX
    assert load(bundle, "auto").description.endswith("cpu")
    assert main(["run", str(bundle.path), "--engine", "onnxruntime", "--provider", RTX, "--prompt", "cat"]) != 0
    assert "no NVIDIA driver" in capsys.readouterr().err


@needs_nvidia
def test_our_options_are_options_of_the_real_library(bundle):
    """By the header that lies beside it."""
    header = next(Path(find_spec(NVIDIA.module).origin).parent.glob("*provider_options.h")).read_text()
    known = set(re.findall(r'constexpr const char\* k\w+ = "(\w+)"', header))
    ours = tensorrt_rtx.options(bundle, bundle.component("unet"))
    assert set(ours) <= known and len(ours) == 4


def webgpu() -> str:
    import onnxruntime_ep_webgpu

    return onnxruntime_ep_webgpu.get_library_path()


@needs_webgpu
def test_another_real_library_runs_on_its_device_or_says_that_there_is_none(bundle):
    """Microsoft's WebGPU provider: it needs a GPU that Vulkan knows."""
    try:
        engine = load(bundle, f"webgpu={webgpu()}")
    except UserError as error:
        assert "provider webgpu finds no device here" in error.message and "--provider cpu" in error.fix
    else:
        assert np.allclose(
            engine(**IDS)["last_hidden_state"], load(bundle, "cpu")(**IDS)["last_hidden_state"], atol=1e-2
        )


@needs_webgpu
def test_a_real_session_that_fails_is_an_error_and_no_session_on_the_cpu(bundle):
    """A device that only compiles (a name that ends in .virtual asks for one): ONNX Runtime itself would fall back."""
    code = (
        "import sys, accel\n"
        "try: accel.load_engine(sys.argv[1], 'text_encoder', 'onnxruntime', provider=sys.argv[2])\n"
        "except accel.UserError as error: print(error.message)"
    )
    command = [sys.executable, "-c", code, str(bundle.path), f"webgpu.virtual={webgpu()}"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(
        r"ONNX Runtime cannot load \S+ on webgpu.virtual: WebGPU EP was selected on a virtual.*\n", told
    )


def test_what_is_no_library_of_providers_is_refused(bundle, tmp_path):
    import onnxruntime as ort

    shared = next(Path(ort.capi.__path__[0]).glob("*onnxruntime_providers_shared*"))
    with pytest.raises(UserError, match="none of ONNX Runtime's providers"):
        load(bundle, f"other={shared}")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(UserError, match="provider other cannot be used here: .*text.so"):
        load(bundle, f"other={tmp_path / 'text.so'}")
    for text, message in ((f"other={tmp_path / 'none.so'}", "no provider library"), ("=x", "does not name")):
        with pytest.raises(UserError, match=message):
            load(bundle, text)
    with pytest.raises(UserError, match="unknown provider 'other'") as caught:
        load(bundle, "other")
    assert "tensorrt-rtx" in caught.value.fix and "NAME=PATH" in caught.value.fix


# The choice of devices, on a fake


def test_a_session_runs_on_the_device_that_was_asked_for(bundle, fake):
    world = fake(("Fake", "CPU"), ("Fake", "GPU"), ("Fake", "GPU", 1))
    provider, wanted = f"fake={world.path}", load(bundle, "cpu")(**IDS)["last_hidden_state"]
    for place, index in (("auto", 0), ("cpu", 0), ("gpu", 1), ("cuda:1", 2)):
        with load(bundle, provider, device=place, provider_options={"level": 3}) as engine:
            assert np.array_equal(engine(**IDS)["last_hidden_state"], wanted)
            assert engine.device == "cpu" and engine.native == "numpy"  # where its tensors are
        devices, options = world.sessions[-1]
        assert devices == [world.offers[index]] and options == {"level": "3"}
    assert world.registered == [("fake", str(world.path))]  # once in a process
    for place in ("gpu:2", "npu", "tpu", "gpu:x"):
        with pytest.raises(
            UserError, match=f"provider fake has no device '{place}' here; it has 3: cpu, gpu"
        ) as caught:
            load(bundle, provider, device=place)
        assert "--device cpu" in caught.value.fix


def test_a_library_of_several_providers_is_asked_for_by_name(bundle, fake):
    world = fake(("One", "CPU"), ("Two", "CPU"))
    with pytest.raises(UserError, match="brings several providers: One, Two") as caught:
        load(bundle, f"x={world.path}")
    assert caught.value.fix == f"--provider One={world.path}"
    load(bundle, f"Two={world.path}")
    assert world.sessions[-1][0][0].ep_name == "Two"


def test_what_the_provider_leaves_to_the_cpu_is_told(bundle, fake):
    world = fake(("Fake", "GPU"), leaves=("MatMul",))
    with pytest.warns(Notice, match=r"provider fake takes \d+ of \d+ operators of text_encoder.*: \d+ MatMul"):
        load(bundle, f"fake={world.path}")
    world.leaves = ()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        load(bundle, f"fake={world.path}")
    world.takes = False
    with pytest.raises(UserError, match="takes no operator of text_encoder: the CPU would run all of it"):
        load(bundle, f"fake={world.path}")


@pytest.fixture
def card(fake, monkeypatch):
    """NVIDIA's provider with a card."""
    world = fake((NVIDIA.provider, "GPU"), known=["nv_runtime_cache_path", *NV_SHAPES])
    monkeypatch.setattr(plugins, "named", lambda text: plugins.Plugin(RTX, world.path, NVIDIA.provider, NVIDIA.needs))
    return world


NV_SHAPES = [f"nv_profile_{end}_shapes" for end in ("min", "opt", "max")]


def test_nvidias_provider_is_told_shapes_and_where_to_cache(bundle, card, tmp_path):
    engine = accel.load_engine(bundle, "unet", "onnxruntime", provider=RTX)
    assert card.registered == [(NVIDIA.provider, str(card.path))]
    assert re.fullmatch(r"onnxruntime \S+, tensorrt-rtx on gpu", engine.description)
    options = card.sessions[-1][1]
    low, _, high = (options[name] for name in NV_SHAPES)
    assert low.startswith("sample:1x4x") and ",encoder_hidden_states:1x77x" in low and high.startswith("sample:8x4x")
    cache = Path(options["nv_runtime_cache_path"])
    assert cache.is_relative_to(tmp_path / "cache") and cache.name == "unet" and cache.stat().st_mode & 0o077 == 0
    # Other weights are not to be found by what was compiled for the bundle's.
    engine.set_weights({bundle.component("unet").inputs[0].name: np.zeros(1, np.float32)})
    assert "nv_runtime_cache_path" not in card.sessions[-1][1] and NV_SHAPES[0] in card.sessions[-1][1]
    mine = {"nv_runtime_cache_path": "here"}
    accel.load_engine(bundle, "unet", "onnxruntime", provider=RTX, provider_options=mine)
    assert card.sessions[-1][1]["nv_runtime_cache_path"] == "here"


def test_compiled_models_that_nobody_signed_are_refused(bundle, fake):
    world = fake(("Fake", "GPU"))
    for options in ({"session": {"ep.context_enable": "1"}}, {"provider_options": {"nv_dump_ep_context_model": "1"}}):
        with pytest.raises(UserError, match="EPContext") as caught:
            load(bundle, f"fake={world.path}", **options)
        assert "accel build" in caught.value.fix
    with pytest.raises(UserError, match="takes no io_binding"):
        load(bundle, f"fake={world.path}", io_binding=True)


def test_an_old_onnxruntime_and_a_missing_package_say_what_to_install(bundle, fake, monkeypatch):
    import onnxruntime as ort

    world = fake(("Fake", "GPU"))
    monkeypatch.delattr(ort, "register_execution_provider_library")
    with pytest.raises(UserError, match="takes no plugin providers") as caught:
        load(bundle, f"fake={world.path}")
    assert "onnxruntime>=" in caught.value.fix
    monkeypatch.setattr(plugins, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="provider tensorrt-rtx is not installed") as caught:
        load(bundle, RTX)
    assert "accel-diffusion[tensorrt-rtx]" in caught.value.fix
    assert "tensorrt-rtx" not in status("onnxruntime").detail


def test_the_command_line_takes_a_plugin(bundle, fake, tmp_path, capsys):
    world = fake(("Fake", "GPU"))
    words = ["--engine", "onnxruntime", "--provider", f"fake={world.path}", "--device", "gpu", "--prompt", "cat"]
    small = ["--steps", "1", "--width", "32", "--height", "32", "--json", "--out", str(tmp_path / "cat.png")]
    assert main(["run", str(bundle.path), *words, *small]) == 0
    assert "fake on gpu" in json.loads(capsys.readouterr().out)["engines"]["unet"]
