"""Running engine files of TensorRT-RTX, on a fake made from its API: parity, runtime cache, validity, targets."""

from __future__ import annotations

import threading

import numpy as np
import onnxruntime
import pytest

import accel
from accel.bundle import Bundle
from accel.engines import fitting_engine_file, status, tensorrt_rtx
from accel.engines.refit import Refit
from accel.errors import UserError
from accel.export.tensorrt.build import build
from accel.export.tensorrt.options import BuildOptions
from accel.trt import engine_files, library, preflight, runtime_cache
from accel.trt.flavours import runs_on

VAE, RTX = "vae_decoder", "tensorrt-rtx"


@pytest.fixture
def bundle(bundle_copy):
    return Bundle.open(bundle_copy)


@pytest.fixture(scope="module")
def expected(sd15_bundle):
    session = onnxruntime.InferenceSession(str(sd15_bundle / VAE / "model.onnx"))
    return lambda feeds: session.run(None, feeds)[0]


def inputs(batch=2, height=16, width=16, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"latent_sample": rng.standard_normal((batch, 4, height, width), dtype=np.float32)}


@pytest.mark.parametrize("graph", ["off", "step"])
def test_an_engine_computes_what_the_graph_computes(bundle, tensorrt_rtx, expected, graph):
    (file,) = build(bundle, (VAE,), engine=RTX)
    vae = accel.load_engine(bundle, VAE, RTX, cuda_graph=graph, specialization="eager")
    kept = []
    for feeds in (inputs(), inputs(3, 16, 32), inputs(4, 32, 24), inputs(seed=1)):
        kept.append((vae(**feeds)["sample"], expected(feeds)))
    for ours, theirs in kept:  # outputs are nobody else's memory
        assert np.abs(ours.numpy() - theirs).max() < 1e-5
    strategy = "DISABLED" if graph == "off" else "WHOLE_GRAPH_CAPTURE"
    assert f"context {strategy} EAGER" in tensorrt_rtx._world.calls
    assert vae.description.startswith("tensorrt-rtx 1.7.1.116, Fake GPU")
    assert file.record["measured"]["activations"] == 4096  # the builder's own figure
    vae.close()


def test_threads_have_a_context_each(bundle, tensorrt_rtx, expected):
    build(bundle, (VAE,), engine=RTX)
    vae, wrong = accel.load_engine(bundle, VAE, RTX), []

    def work(seed):
        for _ in range(3):
            feeds = inputs(seed=seed)
            if np.abs(vae(**feeds)["sample"].numpy() - expected(feeds)).max() > 1e-5:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_was_compiled_for_the_card_is_kept_for_the_next_process(bundle, tensorrt_rtx):
    (file,) = build(bundle, (VAE,), engine=RTX)
    with accel.load_engine(bundle, VAE, RTX) as vae:
        vae(**inputs())
        path = runtime_cache.path_for(file.key, "1.7.1.116", vae.cuda.gpu)
    assert path.is_file() and "runtime cache" not in tensorrt_rtx._world.calls
    assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0
    with accel.load_engine(bundle, VAE, RTX) as vae:
        vae(**inputs())
    assert tensorrt_rtx._world.calls.count("runtime cache") == 1
    path.write_bytes(path.read_bytes()[:-1])  # damaged: counts as empty, and is written anew
    with accel.load_engine(bundle, VAE, RTX) as vae:
        vae(**inputs())
    assert tensorrt_rtx._world.calls.count("runtime cache") == 1
    path.chmod(0o666)  # anybody's code
    with accel.load_engine(bundle, VAE, RTX) as vae:
        vae(**inputs())
    assert tensorrt_rtx._world.calls.count("runtime cache") == 1


@pytest.mark.parametrize(
    "targets, capability, reason",
    [
        (["sm86", "sm120"], "8.9", "it was built for sm86, sm120, here is Fake GPU (sm89)"),
        ([], "7.5", "it was built for sm80 and newer, here is Fake GPU (sm75)"),
        (["sm89"], "8.9", ""),
        ([], "12.0", ""),
        ([], "13.0", ""),
    ],
)
def test_a_card_that_is_no_target_is_refused_with_the_build_that_helps(
    bundle, tensorrt_rtx, fakes, monkeypatch, targets, capability, reason
):
    monkeypatch.setattr(fakes("cuda").Cuda, "capability", capability)
    build(bundle, (VAE,), engine=RTX, targets=targets)
    assert (fitting_engine_file(bundle, VAE) is None) == bool(reason)
    if reason:
        with pytest.raises(preflight.NoEngineFile) as caught:
            accel.load_engine(bundle, VAE, RTX)
        assert reason in caught.value.message and "--engine tensorrt-rtx" in caught.value.fix
    else:
        accel.load_engine(bundle, VAE, RTX)(**inputs())
        assert accel.load_engine(bundle, VAE).name == RTX  # auto


def test_another_version_is_refused(bundle, tensorrt_rtx, monkeypatch):
    build(bundle, (VAE,), engine=RTX)
    monkeypatch.setattr(tensorrt_rtx, "__version__", "1.8.0.1")
    with pytest.raises(preflight.NoEngineFile, match="built with TensorRT-RTX 1.7.1.116, here is 1.8.0.1"):
        accel.load_engine(bundle, VAE, RTX)


def test_what_the_library_itself_finds_wrong_is_told_in_words(bundle, tensorrt_rtx):
    build(bundle, (VAE,), engine=RTX, targets=["sm89"])
    tensorrt_rtx._world.capability = "SM120"  # the record says what the engine file does not
    with pytest.raises(UserError, match="does not run the engine file of vae_decoder on Fake GPU: unsupported cc"):
        accel.load_engine(bundle, VAE, RTX)
    assert "deserialize" not in tensorrt_rtx._world.calls


def test_engine_files_need_the_signature_as_before(bundle, tensorrt_rtx):
    (file,) = build(bundle, (VAE,), engine=RTX)
    file.path.with_suffix(".sig").unlink()
    with pytest.raises(preflight.NoEngineFile, match="does not carry your signature") as caught:
        accel.load_engine(bundle, VAE, RTX)
    assert "accel trust" in caught.value.fix


def test_the_engines_do_not_take_each_others_files(bundle, tensorrt_rtx, tensorrt):
    (ours,) = build(bundle, (VAE,), engine=RTX)
    with pytest.raises(preflight.NoEngineFile, match="has no TensorRT engine file of vae_decoder"):
        accel.load_engine(bundle, VAE, "tensorrt")
    (theirs,) = build(bundle, (VAE,))
    assert ours.key != theirs.key and "targets" not in theirs.identity
    assert [file.engine for file in engine_files.find(bundle, VAE)] == ["tensorrt", RTX]
    assert accel.load_engine(bundle, VAE, RTX).engine_file.key == ours.key
    assert accel.load_engine(bundle, VAE, "tensorrt").engine_file.key == theirs.key


def test_weights_are_refitted_there_and_back(bundle, tensorrt_rtx):
    """LoRA by refit: other weights, then the bundle's own, bit by bit."""
    build(bundle, (VAE,), engine=RTX, options=BuildOptions(refittable=True))
    vae = accel.load_engine(bundle, VAE, RTX, cuda_graph="step")
    before, refit = vae(**inputs())["sample"].clone(), Refit(vae)
    name = next(name for name in refit._own if name.endswith("conv_in.weight"))
    digest = refit.weights({name: refit._own[name] * 2})
    changed = vae(**inputs())["sample"].clone()
    assert np.abs((changed - before).numpy()).max() > 1e-3 and refit.changed == {name}
    assert refit.weights({}) != digest and (vae(**inputs())["sample"] == before).all()
    assert refit.weights({name: refit._own[name] * 2}) == digest and (vae(**inputs())["sample"] == changed).all()


def test_without_a_driver_there_is_no_refittable_build(bundle, tensorrt_rtx, monkeypatch):
    monkeypatch.setattr(library, "has_driver", lambda: False)
    with pytest.raises(UserError, match="cannot do --refittable here: .*no NVIDIA driver") as caught:
        build(bundle, (VAE,), engine=RTX, options=BuildOptions(refittable=True))
    assert "--lora FILE" in caught.value.fix


def test_weights_are_streamed_within_a_budget(bundle, tensorrt_rtx, expected):
    build(bundle, (VAE,), engine=RTX, options=BuildOptions(weight_streaming=True))
    with accel.load_engine(bundle, VAE, RTX, streaming_budget=4096) as vae:
        assert vae.engine.weight_streaming_budget_v2 == 4096
        assert np.abs(vae(**inputs())["sample"].numpy() - expected(inputs())).max() < 1e-5


@pytest.mark.parametrize("option, value", [("cuda_graph", "loop"), ("specialization", "often")])
def test_options_that_it_has_not_are_refused(bundle, tensorrt_rtx, option, value):
    build(bundle, (VAE,), engine=RTX)
    with pytest.raises(UserError, match=value) as caught:
        accel.load_engine(bundle, VAE, RTX, **{option: value})
    assert "one of: " in caught.value.fix


def test_the_status_says_what_it_can_do_here(tensorrt_rtx, fakes, monkeypatch):
    assert status(RTX).ok and "builds without a GPU" in status(RTX).detail
    monkeypatch.setattr(fakes("cuda").Cuda, "capability", "9.0")
    state = status(RTX)
    assert not state.ok and "has no kernels for Fake GPU (sm90)" in state.detail and "--engine tensorrt" in state.fix
    monkeypatch.setattr(library, "has_driver", lambda: False)
    state = status(RTX)
    assert not state.ok and "builds engine files here, but cannot run them: there is no NVIDIA driver" in state.detail
    monkeypatch.setattr(library, "installed", lambda name="tensorrt": None)
    assert "accel-diffusion[tensorrt-rtx]" in status(RTX).fix


def test_cards_by_compute_capability():
    assert runs_on((), "8.0") and runs_on((), "12.1") and not runs_on((), "7.5")
    assert runs_on(("sm75",), "7.5") and not runs_on(("sm75",), "8.6")
    assert tensorrt_rtx.supported("8.6") and tensorrt_rtx.supported("13.0") and not tensorrt_rtx.supported("9.0")
