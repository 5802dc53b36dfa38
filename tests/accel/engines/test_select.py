"""Every engine computes the same function, keeps its hands off its inputs, and says what is missing."""

from __future__ import annotations

import sys
from importlib import import_module

import numpy as np
import pytest
import torch

import accel
from accel import engines
from accel.bundle import Bundle
from accel.engines import compile as compile_engine
from accel.errors import Notice, UserError
from accel.parity import relative_l2

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def feeds_of(bundle, component, sizes=None, seed=0):
    from accel.export.graph.trace import example

    record = Bundle.open(bundle).component(component)
    sizes = {dim: min(limit.max, limit.min + limit.multiple) for dim, limit in record.dims.items()} | (sizes or {})
    return {name: tensor.numpy() for name, tensor in example(record.inputs, sizes, seed=seed).items()}


@pytest.fixture(scope="module")
def engine(sd15_bundle):
    loaded = {}

    def get(name, component, **options):
        if name == "openvino":
            pytest.importorskip("openvino")
        key = (name, component, *sorted(options.items()))
        if key not in loaded:
            loaded[key] = accel.load_engine(sd15_bundle, component, engine=name, **options)
        return loaded[key]

    return get


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_compiled_equals_eager(name, component, engine, sd15_bundle):
    feeds = feeds_of(sd15_bundle, component)
    expected = engine("eager", component)(**feeds)
    actual = engine(name, component)(**feeds)
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert relative_l2(actual[key], value.numpy()) < 1e-4
        assert actual[key].dtype == np.float32


def test_torch_compile_equals_eager(engine, sd15_bundle):
    feeds = feeds_of(sd15_bundle, "text_encoder")
    expected = engine("eager", "text_encoder")(**feeds)["last_hidden_state"]
    compile_engine._note_compiling.cache_clear()
    with pytest.warns(Notice, match="first call of each network takes up to minutes"):
        actual = engine("compile", "text_encoder")(**feeds)["last_hidden_state"]
    assert relative_l2(actual.numpy(), expected.numpy()) < 1e-4


@pytest.mark.parametrize("options", [{}, {"io_binding": True}])
def test_onnxruntime_leaves_inputs_alone_and_returns_fresh_memory(options, engine, sd15_bundle):
    feeds = feeds_of(sd15_bundle, "unet")
    run = engine("onnxruntime", "unet", **options)
    held = {name: run.array(value) for name, value in feeds.items()}
    first = run(**held)["out_sample"]
    kept = np.array(first)
    second = run(**(held | {"sample": run.array(feeds["sample"] * 2)}))["out_sample"]
    for name, value in held.items():
        assert np.array_equal(np.asarray(value), feeds[name])
    assert np.array_equal(np.asarray(first), kept)  # the second call wrote elsewhere
    assert not np.shares_memory(np.asarray(first), np.asarray(held["sample"]))
    assert not np.array_equal(np.asarray(second), kept)


def test_openvino_results_survive_the_next_call(engine, sd15_bundle):
    feeds = feeds_of(sd15_bundle, "unet")
    run = engine("openvino", "unet")
    first = run(**feeds)["out_sample"]
    kept = first.copy()
    run(**(feeds | {"sample": feeds["sample"] * 2}))
    assert np.array_equal(first, kept)


@pytest.mark.parametrize(("name", "native"), [("eager", torch.Tensor), ("onnxruntime", np.ndarray)])
def test_numpy_and_torch_go_in_the_engines_own_kind_comes_out(name, native, engine, sd15_bundle):
    feeds = feeds_of(sd15_bundle, "vae_decoder")
    run = engine(name, "vae_decoder")
    from_numpy = run(**feeds)["sample"]
    from_torch = run(**{k: torch.from_numpy(v) for k, v in feeds.items()})["sample"]
    assert isinstance(from_numpy, native)
    assert np.array_equal(np.asarray(from_numpy), np.asarray(from_torch))


def test_scalars_read_only_and_strided_arrays_go_in_too(engine, sd15_bundle):
    feeds = feeds_of(sd15_bundle, "unet")
    expected = engine("eager", "unet")(**feeds)["out_sample"].numpy()
    frozen = feeds["sample"].copy()
    frozen.setflags(write=False)
    strided = np.ascontiguousarray(feeds["encoder_hidden_states"][:, ::-1])[:, ::-1]
    odd = {"sample": frozen, "timestep": np.float32(feeds["timestep"]), "encoder_hidden_states": strided}
    for name in ("eager", "onnxruntime", "openvino"):
        assert relative_l2(np.asarray(engine(name, "unet")(**odd)["out_sample"]), expected) < 1e-4


def test_lower_dtypes_stay_near_and_keep_the_interface(engine, sd15_bundle):
    feeds = feeds_of(sd15_bundle, "unet")
    expected = engine("eager", "unet")(**feeds)["out_sample"].numpy()
    bf16 = engine("eager", "unet", dtype="bf16")(**feeds)["out_sample"]
    assert bf16.dtype == torch.float32
    assert 1e-5 < relative_l2(bf16.numpy(), expected) < 0.05


def test_a_low_precision_that_makes_nan_is_refused_when_it_is_loaded(sd15_bundle, monkeypatch):
    """OpenVINO's AMX kernels do that to the real-size SD-Tiny UNet; here the engine is made to."""
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    module = import_module("accel.engines.openvino")
    nan = {"sample": np.full((1, 3, 64, 64), np.nan, np.float32)}
    monkeypatch.setattr(module.OpenVino, "run", lambda self, feeds: nan)
    with pytest.raises(UserError, match="NaN") as error:
        accel.load_engine(sd15_bundle, "vae_decoder", engine="openvino", dtype="bf16")
    assert "fp32" in error.value.fix
    accel.load_engine(sd15_bundle, "vae_decoder", engine="openvino")  # float32 is not tried out


def test_swapped_inputs_are_refused(engine, sd15_bundle):
    feeds = feeds_of(sd15_bundle, "unet")
    swapped = feeds | {"sample": feeds["encoder_hidden_states"], "encoder_hidden_states": feeds["sample"]}
    with pytest.raises(UserError, match="sample"):
        engine("onnxruntime", "unet")(**swapped)
    sideways = feeds | {"sample": feeds["sample"].transpose(0, 2, 3, 1)}
    with pytest.raises(UserError, match="sample"):
        engine("onnxruntime", "unet")(**sideways)


def test_an_explicit_engine_that_is_missing_is_an_error_and_auto_goes_on(sd15_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr("accel.engines.openvino.find_spec", lambda name: None)
    with pytest.raises(UserError, match="openvino") as error:
        accel.load_engine(sd15_bundle, "unet", engine="openvino")
    assert "pip install" in error.value.fix
    assert engines.choose("auto") == "onnxruntime"


@pytest.mark.parametrize(
    ("engine_name", "options", "named"),
    [
        ("tensorflow", {}, "tensorflow"),
        ("onnxruntime", {"provider": "npu"}, "npu"),
        ("onnxruntime", {"dtype": "bf16"}, "dtype"),
        ("onnxruntime", {"device": "gpu0"}, "gpu0"),
        ("onnxruntime", {"device": "cpu", "provider": "cuda"}, "the cuda provider does not run on cpu"),
        ("onnxruntime", {"device": "cuda", "provider": "cpu"}, "the cpu provider does not run on cuda"),
        ("eager", {"dtype": "fp8"}, "fp8"),
        ("compile", {"mode": "fastest"}, "fastest"),
    ],
)
def test_impossible_choices_are_named(engine_name, options, named, sd15_bundle):
    with pytest.raises(UserError) as error:
        accel.load_engine(sd15_bundle, "vae_decoder", engine=engine_name, **options)
    assert named in str(error.value) and error.value.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_an_error_not_a_fallback(sd15_bundle):
    with pytest.raises(UserError, match="cuda"):
        accel.load_engine(sd15_bundle, "vae_decoder", engine="eager", device="cuda")
    with pytest.raises(UserError, match="cuda"):
        accel.load_engine(sd15_bundle, "vae_decoder", engine="onnxruntime", provider="cuda")
    with pytest.raises(UserError, match="cuda"):
        accel.load_engine(sd15_bundle, "vae_decoder", engine="onnxruntime", device="cuda:1")
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        accel.load_engine(sd15_bundle, "vae_decoder", device="cuda:1")


def test_auto_goes_where_the_device_says(sd15_bundle, monkeypatch):
    real = engines.status
    gpu = engines.Status(True, "onnxruntime 1.0 (cuda, cpu)")
    monkeypatch.setattr(engines.select, "status", lambda name: gpu if name == "onnxruntime" else real(name))
    monkeypatch.setattr(engines.select, "usable_cuda", lambda: True)
    assert engines.choose("auto", device="cuda:1") == engines.choose("auto") == "onnxruntime"
    assert engines.choose("auto", device="cpu") == "openvino"
    assert accel.load_engine(sd15_bundle, "vae_decoder", device="cpu").name == "openvino"
    assert accel.load_engine(sd15_bundle, "vae_decoder", "onnxruntime", device="cpu").device == "cpu"


def test_unknown_component_lists_the_known_ones(sd15_bundle):
    with pytest.raises(UserError) as error:
        accel.load_engine(sd15_bundle, "safety_checker", engine="onnxruntime")
    assert "vae_decoder" in error.value.fix
