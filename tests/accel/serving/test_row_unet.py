"""A UNet with a timestep for each row gives each row what the UNet with one timestep gives it."""

import numpy as np
import pytest

from accel.bundle import Bundle
from accel.engines import load_engine
from accel.files import cache_dir
from accel.loading.loader import runnable
from accel.serving.row_unet import with_row_timesteps


@pytest.mark.parametrize(
    "model, engine, tolerance",
    [
        ("digits/tiny-4step-int8", "openvino", 1e-5),
        ("digits/tiny-4step-int8", "onnxruntime", 0.05),
        ("digits/tiny-4step", "eager", 1e-5),
    ],
)
def test_rows_at_different_steps_share_a_call(model, engine, tolerance):
    ready = runnable(model, engine)
    bundle = ready if isinstance(ready, Bundle) else Bundle.open(ready)
    rows = with_row_timesteps(bundle, engine)
    assert rows.component("unet").inputs[1].shape == ("batch",) and bundle.component("unet").inputs[1].shape == ()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 16, 16), np.float32)
    text = rng.standard_normal((3, 77, 64), np.float32)
    times = np.array([999, 500, 20], np.float32)
    threads = {} if engine == "eager" else {"threads": 1}
    with load_engine(bundle, "unet", engine, **threads) as one, load_engine(rows, "unet", engine, **threads) as many:
        out = np.asarray(many(sample=x, timestep=times, encoder_hidden_states=text)["out_sample"])
        for i, t in enumerate(times):
            same = [np.repeat(value[i : i + 1], 3, axis=0) for value in (x, text)]
            single = one(sample=same[0], timestep=np.asarray(t), encoder_hidden_states=same[1])["out_sample"]
            assert np.abs(np.asarray(single)[0] - out[i]).max() <= tolerance
    rows.verify(["unet"])  # the bundle's own files are untouched


def test_the_edited_graph_is_written_once(monkeypatch):
    bundle = Bundle.open("digits/tiny-1step-int8")
    first = with_row_timesteps(bundle, "onnxruntime")
    stamps = {path: path.stat().st_mtime_ns for path in first.edited.rglob("*") if path.is_file()}
    assert cache_dir() in first.edited.parents and len(stamps) == 3
    again = with_row_timesteps(bundle, "onnxruntime")
    assert again.edited == first.edited and stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert with_row_timesteps(first, "onnxruntime") is first
    monkeypatch.setattr("accel.serving.row_unet.choose", lambda *_: "tensorrt")
    assert with_row_timesteps(bundle, "tensorrt") is bundle
