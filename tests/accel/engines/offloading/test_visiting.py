"""Offload on the fake CUDA, which counts copies of weights and the bytes that it holds."""

import numpy as np
import pytest
import torch

import accel
from accel.engines import eager
from accel.errors import UserError

CALL = dict(seed=1, steps=3, output_type="np")
ALWAYS = ("text_encoder", "unet", "vae_decoder")


@pytest.fixture
def cuda(fakes, monkeypatch):
    """The fake device in the place of the real one, with nothing on it."""
    fake = fakes("cuda").Cuda
    for count in ("uploads", "uploaded", "resident", "most"):
        monkeypatch.setattr(fake, count, 0)
    monkeypatch.setattr(eager, "Cuda", fake)
    return fake


@pytest.fixture(scope="module")
def plain(smallest_bundle) -> np.ndarray:
    with accel.load(smallest_bundle, "eager", device="cpu") as pipe:
        return pipe(["the cat"], **CALL).images


@pytest.fixture(scope="module")
def sizes(smallest_bundle) -> dict[str, int]:
    """Component -> bytes of its weights."""
    with accel.load(smallest_bundle, "eager", device="cpu") as pipe:
        modules = {name: pipe.engines[name].module for name in ALWAYS}
        return {
            name: sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
            for name, module in modules.items()
        }


def test_model_offload_holds_one_network_at_a_time_and_copies_each_once_an_image(cuda, smallest_bundle, plain, sizes):
    with accel.load(smallest_bundle, "eager", device="cuda", offload="model") as pipe:
        assert cuda.uploads == 0, "nothing is on the GPU before the first call"
        assert np.array_equal(pipe(["the cat"], **CALL).images, plain)
        assert cuda.resident == 0 and cuda.uploaded == sum(sizes.values())
        assert np.array_equal(pipe(["the cat"], **CALL).images, plain)
        # The text's conditioning is kept, so its encoder does not come back.
        assert cuda.resident == 0 and cuda.uploaded == 2 * sum(sizes.values()) - sizes["text_encoder"]
        assert cuda.most == max(sizes.values()) < sum(sizes.values())
        assert set(pipe.engines._loaded) == set(ALWAYS), "weights wait in host memory, and are not read again"
        assert "model offload" in pipe.engines["unet"].description


def test_sequential_offload_holds_one_layer_at_a_time(cuda, smallest_bundle, plain, sizes):
    with accel.load(smallest_bundle, "eager", device="cuda", offload="sequential") as pipe:
        assert np.array_equal(pipe(["the cat"], **CALL).images, plain)
        layers = [
            sum(t.nbytes for t in (*part.parameters(recurse=False), *part.buffers(recurse=False)))
            for name in ALWAYS
            for part in pipe.engines[name].module.modules()
        ]
        assert cuda.resident == 0 and max(layers) <= cuda.most < 2 * max(layers) < max(sizes.values())
        # Every one of three steps copies the whole UNet.
        assert cuda.uploaded > 2.9 * sizes["unet"]


def test_a_failed_call_leaves_nothing_behind(cuda, smallest_bundle):
    with accel.load_engine(smallest_bundle, "unet", "eager", device="cuda", offload="sequential") as unet:
        feeds = {
            s.name: torch.zeros(
                s.concrete({n: r.min for n, r in unet.component.dims.items()}), dtype=getattr(torch, s.dtype)
            )
            for s in unet.component.inputs
        }
        handle = unet.module.model.conv_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(Exception, match="division"):
            unet(**feeds)
        assert cuda.resident == 0
        handle.remove()
        assert np.isfinite(unet(**feeds)["out_sample"].numpy()).all()


def test_other_weights_are_uploaded_in_place_of_the_old_ones(cuda, smallest_bundle):
    plain = accel.load_engine(smallest_bundle, "unet", "eager", device="cpu")
    unet = accel.load_engine(smallest_bundle, "unet", "eager", device="cuda", offload="model")
    sizes = {name: limits.min for name, limits in unet.component.dims.items()}
    feeds = {s.name: torch.ones(s.concrete(sizes), dtype=getattr(torch, s.dtype)) for s in unet.component.inputs}
    before = unet(**feeds)["out_sample"]
    for engine in (plain, unet):
        engine.set_weights({"conv_out.bias": np.ones(4, np.float32)})
    changed = unet(**feeds)["out_sample"]
    assert torch.equal(changed, plain(**feeds)["out_sample"]) and not torch.equal(changed, before)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_that_cannot_wait_are_closed_after_their_phase(smallest_bundle, engine):
    pytest.importorskip(engine)
    with accel.load(smallest_bundle, engine, offload="model") as pipe:
        pipe(["the cat"], **CALL)
        assert pipe.engines._loaded == {}


def test_what_cannot_be_offloaded_is_refused(cuda, smallest_bundle):
    with pytest.raises(UserError, match="this engine runs on the CPU"):
        accel.load_engine(smallest_bundle, "unet", "eager", device="cpu", offload="sequential")
    with pytest.raises(UserError, match="has no option 'offload'"):
        accel.load_engine(smallest_bundle, "unet", "onnxruntime", offload="sequential")
    with pytest.raises(UserError, match="all of its weights at once"):
        accel.load_engine(smallest_bundle, "unet", "compile", device="cuda", offload="sequential")
    with pytest.raises(UserError, match="CUDA graphs hold their weights"):
        accel.load_engine(smallest_bundle, "unet", "eager", cuda_graph="step", offload="model")
    with pytest.raises(UserError, match="unknown offload 'both'"):
        accel.load(smallest_bundle, "eager", offload="both")
    with pytest.raises(UserError, match="leave one of them out"):
        accel.load(smallest_bundle, "eager", offload="model", low_memory=True)


def test_text_encoders_take_a_dtype_of_their_own(smallest_bundle, plain):
    with accel.load(smallest_bundle, "eager", device="cpu", text_encoder_dtype="bf16") as pipe:
        assert pipe.engines["text_encoder"].dtype == torch.bfloat16 and pipe.engines["unet"].dtype == torch.float32
        made = pipe(["the cat"], **CALL).images
        assert 0 < np.abs(made - plain).max() < 0.2
