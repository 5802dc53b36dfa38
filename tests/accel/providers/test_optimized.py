"""The optimized graphs that ONNX Runtime's sessions leave for the next process."""

from __future__ import annotations

import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest

import accel
from accel.bench import variants
from accel.bundle import Bundle, kept
from accel.engines.base import noise_for
from accel.engines.folds import in_onnx
from accel.providers import optimized


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(optimized, "LEAST", 0)
    return tmp_path / "cache" / "onnxruntime"


@pytest.fixture
def sources(monkeypatch):
    """What sessions were made of: a path, or the bytes of a graph."""
    made, own = [], onnxruntime.InferenceSession

    def session(source, *rest, **more):
        made.append(source)
        return own(source, *rest, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return made


def output(bundle, component="unet", **options):
    """What a newly loaded network makes of the same noise."""
    with accel.load_engine(bundle, component, "onnxruntime", provider="cpu", **options) as engine:
        feeds = noise_for(engine.component, {name: limits.min for name, limits in engine.component.dims.items()})
        return next(iter(engine.run(feeds).values()))


def folders(cache):
    return sorted(path for path in cache.glob("[!.]*")) if cache.is_dir() else []


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_the_next_load_reads_the_kept_graph_and_computes_the_same_bits(component, smallest_bundle, cache, sources):
    first = output(smallest_bundle, component)
    (place,) = folders(cache)
    assert not str(sources[-1]).startswith(str(cache))
    np.testing.assert_array_equal(output(smallest_bundle, component), first)
    assert sources[-1] == str(place / "model.onnx") and folders(cache) == [place]
    np.testing.assert_array_equal(output(smallest_bundle, component, cache=False), first)
    assert not str(sources[-1]).startswith(str(cache))


def test_a_folded_graph_is_kept_folded(smallest_bundle, cache, sources, monkeypatch):
    """Its own graph is bytes, whose weights ONNX Runtime is told where to find; the kept one has them beside it."""
    monkeypatch.setattr(in_onnx, "CHANNELS", 1)
    first = output(smallest_bundle, "vae_decoder")
    assert isinstance(sources[-1], bytes)
    np.testing.assert_array_equal(output(smallest_bundle, "vae_decoder"), first)
    (place,) = folders(cache)
    assert sources[-1] == str(place / "model.onnx") and len(sources) == 2
    kept_graph = onnx.load(place / "model.onnx", load_external_data=False)
    assert "Resize" not in {node.op_type for node in kept_graph.graph.node}
    (place / "model.bin").unlink()
    np.testing.assert_array_equal(output(smallest_bundle, "vae_decoder"), first)
    output(smallest_bundle, "vae_decoder", folds=False)
    assert len(folders(cache)) == 2


def test_another_setting_or_bundle_has_a_graph_of_its_own(smallest_bundle, bundle_of, edit_manifest, cache):
    output(smallest_bundle)
    output(smallest_bundle, threads=1)
    assert len(folders(cache)) == 1, "threads decide nothing that is kept"
    output(smallest_bundle, session={"session.disable_prepacking": "1"})
    assert len(folders(cache)) == 2
    other = bundle_of(smallest_bundle)
    edit_manifest(other.path, lambda data: data["sampler"].update(steps=3))
    output(other.path)
    assert len(folders(cache)) == 3


@pytest.mark.parametrize("damage", ["cut off", "gone", "other weights", "nonsense"])
def test_a_damaged_one_is_made_anew(damage, smallest_bundle, cache, sources):
    first = output(smallest_bundle)
    (place,) = folders(cache)
    if damage == "cut off":
        os.truncate(place / "model.bin", 1000)
    elif damage == "gone":
        (place / "model.bin").unlink()
    else:  # of the right size
        file = place / ("model.bin" if damage == "other weights" else "model.onnx")
        written = file.stat()
        file.write_bytes(bytes(written.st_size))
        if damage == "nonsense":  # which ONNX Runtime itself finds
            os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    np.testing.assert_array_equal(output(smallest_bundle), first)
    np.testing.assert_array_equal(output(smallest_bundle), first)
    assert sources[-1] == str(place / "model.onnx") and kept.found(place)


def test_other_weights_are_neither_kept_nor_read_from_there(smallest_bundle, cache, sources):
    output(smallest_bundle)
    before = folders(cache)
    bundle = Bundle.open(smallest_bundle)
    with accel.load_engine(bundle, "unet", "onnxruntime", provider="cpu") as engine:
        feeds = noise_for(engine.component, {name: limits.min for name, limits in engine.component.dims.items()})
        own = next(iter(engine.run(feeds).values()))
        engine.set_weights({"conv_out.bias": np.full(4, 7, np.float32)})
        assert not str(sources[-1]).startswith(str(cache)) and folders(cache) == before
        changed = next(iter(engine.run(feeds).values()))
        assert np.abs(changed - own).max() > 1
        engine.set_weights({})
        np.testing.assert_array_equal(next(iter(engine.run(feeds).values())), own)


def test_nothing_is_kept_of_small_and_of_quantized_networks_or_without_a_place(smallest_bundle, cache, monkeypatch):
    output("digits/4step-int8")
    assert not folders(cache)
    with monkeypatch.context() as patch:
        patch.setattr(optimized, "LEAST", 1 << 40)
        output(smallest_bundle)
    with monkeypatch.context() as patch:
        patch.setattr(optimized, "KEPT_BYTES", 1000)
        output(smallest_bundle)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        output(smallest_bundle)
    assert not folders(cache)
    shutil.rmtree(cache, ignore_errors=True)
    cache.write_text("in the way")
    output(smallest_bundle)


def test_a_benchmark_neither_reads_nor_writes_one(smallest_bundle, cache, sources):
    bundle = Bundle.open(smallest_bundle)
    output(bundle)
    before = folders(cache)
    with variants.load(bundle, variants.parse("onnxruntime:cpu")):
        assert not any(str(source).startswith(str(cache)) for source in sources) and folders(cache) == before


def test_a_disk_that_gets_full_costs_nothing_but_the_next_load(smallest_bundle, cache, monkeypatch):
    monkeypatch.setitem(optimized._SAVING, "session.optimized_model_external_initializers_file_name", "no/such/folder")
    first = output(smallest_bundle)
    assert not folders(cache) and not list(cache.glob(".*partial*"))
    monkeypatch.undo()
    np.testing.assert_array_equal(output(smallest_bundle, cache=False), first)
