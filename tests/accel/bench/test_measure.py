"""The benchmark: the same work for all, honest gaps, one document."""

from __future__ import annotations

import importlib
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from accel import bench
from accel.bench import document as documents
from accel.bench import facts, quality, report, variants, work
from accel.bench import probe as probing
from accel.bench.page import page as as_page
from accel.bundle import Bundle
from accel.engines.base import Status
from accel.errors import UserError
from accel.pipeline import load as load_pipeline

measuring = importlib.import_module("accel.bench.measure")  # the package's own `measure` is the function
QUICK = bench.BenchSettings(rounds=1, memory=False, steps=2)


@pytest.fixture(autouse=True)
def _no_second_of_matrices(monkeypatch):
    monkeypatch.setattr(facts, "_PEAK_SECONDS", 0.01)


_EAGER = {}


def loader(broken: dict[str, Exception]):
    """Eager's arithmetic under every name, loaded once, so that failures cost no compilation."""

    def load(bundle, variant):
        if variant.name in broken:
            raise broken[variant.name]
        if bundle.path not in _EAGER:
            _EAGER[bundle.path] = load_pipeline(bundle, "eager", verify=False)
        return _EAGER[bundle.path]

    return load


@pytest.fixture(scope="module")
def result(smallest_bundle):
    """eager and onnxruntime measured for real; compile fails as it does without a compiler."""
    chosen = [bench.parse("eager"), bench.parse("onnxruntime"), bench.parse("compile", requested=False)]

    def load(bundle, variant):
        if variant.engine == "compile":
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nlong trace")
        return variants.load(bundle, variant)

    settings = bench.BenchSettings(rounds=5, memory=False, steps=2, batch=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "_PEAK_SECONDS", 0.01)
        return bench.measure(smallest_bundle, chosen, settings, command="accel bench smallest", load=load)


@pytest.fixture(scope="module")
def saved(result) -> dict:
    """As it is read back from a file; json refuses NaN and Infinity here."""
    return json.loads(json.dumps(result.document.as_dict(), allow_nan=False))


def row(document: dict, name: str) -> dict:
    return next(row for row in document["rows"] if row["variant"] == name)


def printed(document: dict, **options) -> str:
    console = Console(file=io.StringIO(), width=200)
    report.show(document, console, **options)
    return console.file.getvalue()


def test_a_named_engine_that_is_missing_is_an_error_and_a_default_one_a_row(monkeypatch, smallest_bundle):
    monkeypatch.setattr(variants, "status", lambda name: Status(name != "openvino", "openvino is not installed", "pip"))
    with pytest.raises(UserError, match="not installed"):
        bench.chosen("eager,openvino")
    chosen = [bench.parse("eager"), bench.parse("openvino", requested=False)]
    found = bench.measure(smallest_bundle, chosen, QUICK, load=loader({}))
    assert row(found.document.as_dict(), "openvino")["reason"] == "openvino is not installed"
    assert found.failed == ()


def test_the_document_has_every_scope_and_what_it_is(saved):
    assert saved["schema"] == "accel-bench/1"
    assert saved["interrupted"] is False
    scopes = row(saved, "onnxruntime")["scopes"]
    assert set(scopes) == {"text_encoder", "unet", "vae_decoder", "image"}
    for found in scopes.values():
        assert found["timing"]["n"] == 5 == len(found["timing"]["samples_s"])
        assert 0 < found["timing"]["min_s"] <= found["timing"]["p50_s"] <= found["timing"]["p90_s"]
    assert saved["work"]["unet_batch"] == 4  # two images, doubled by guidance
    assert saved["work"]["steps"] == 2
    assert scopes["image"]["images_per_s"] == pytest.approx(2 / scopes["image"]["timing"]["p50_s"])
    assert saved["work"]["scopes"]["unet"]["calls_per_image"] == 2


def test_the_memorys_rate_and_the_bytes_of_a_call_are_kept(saved):
    assert saved["environment"]["bandwidth_bytes_per_s"] > 1e8
    unet = saved["work"]["scopes"]["unet"]
    rows, latents = saved["work"]["unet_batch"], unet["inputs"]["sample"]
    assert latents[0] == rows and unet["io_bytes"] >= 2 * 4 * np.prod(latents)  # its input and its output, float32


def test_flops_of_the_image_are_the_sum_of_its_calls(saved):
    parts = saved["bundle"]["components"]
    unet, vae = parts["unet"]["flop"]["total"], parts["vae_decoder"]["flop"]["total"]
    text = parts["text_encoder"]["flop"]["total"]  # of two texts: both images' prompt, and the empty one
    assert saved["bundle"]["image_flop"]["total"] == 2 * unet + vae + text
    found = row(saved, "eager")["scopes"]["unet"]
    assert found["flop_per_s"] == pytest.approx(unet / found["timing"]["p50_s"])
    assert found["peak_fraction"] == pytest.approx(
        found["flop_per_s"] / saved["environment"]["peak_flop_per_s"]["float32"]
    )


def test_parity_and_floor(saved):
    assert saved["noise_floor"][0]["parity"]["unet"]["max_abs"] == 0
    assert saved["noise_floor"][0]["parity"]["image"]["psnr"] == "inf"
    ours = row(saved, "onnxruntime")["parity"]
    assert 0 < ours["unet"]["relative_l2"] < 1e-4 and ours["image"]["max_abs"] < 1
    assert row(saved, "eager")["image_sha256"] != ""


def test_a_difference_in_the_image_is_seen_in_steps_of_1_255():
    image = np.full((1, 16, 16, 3), 0.5)
    near = quality.Sample(np.ones((1, 4)), image + 2 / 255)
    found = quality.parity(near, quality.Sample(np.ones((1, 4)), image))
    assert found["image"]["max_abs"] == pytest.approx(2)


def test_variants_that_do_not_fit_together_are_loaded_one_after_another(smallest_bundle, monkeypatch):
    monkeypatch.setattr(variants, "free_bytes", lambda: 1)
    loaded, most = set(), []

    def load(bundle, variant):
        made = variants.load(bundle, variant)
        close = made.close
        made.close = lambda: (loaded.discard(made), close())
        loaded.add(made)
        most.append(len(loaded))
        return made

    chosen = [bench.parse("onnxruntime"), bench.parse("eager")]
    found = bench.measure(smallest_bundle, chosen, QUICK, load=load).document.as_dict()
    assert max(most) == 1 and not loaded, "the next one is loaded when the last one is closed"
    assert any("each was loaded and timed by itself" in note for note in found["notes"])
    for name in ("eager", "onnxruntime"):
        assert row(found, name)["status"] == "measured" and row(found, name)["scopes"]["image"]["timing"]["n"] == 1
    assert row(found, "onnxruntime")["scopes"]["unet"]["speedup"]["eager"]["ratio"] > 0


def test_variants_that_fit_are_held_together(smallest_bundle, monkeypatch):
    bundle, both = Bundle.open(smallest_bundle), [bench.parse(name) for name in ("eager", "eager:fp16")]
    full, half = (variants.weight_bytes(variant, bundle) for variant in both)
    assert full == 2 * half > 0
    for free, held in ((10 * full, True), (1.5 * full, False)):
        monkeypatch.setattr(variants, "free_bytes", lambda free=free: free)
        assert variants.fit_together(both, bundle) is held


def test_a_decoder_that_overflows_costs_its_own_scopes_and_not_the_row(smallest_bundle):
    class Overflows:
        def __init__(self, pipeline):
            self._pipeline = pipeline

        def __call__(self, **call):
            raise UserError("the image is NaN or infinite (vae_decoder: float16)", "dtype fp32")

        def __getattr__(self, name):
            return getattr(self._pipeline, name)

    def load(bundle, variant):
        made = loader({})(bundle, variant)
        return Overflows(made) if variant.dtype == "fp16" else made

    chosen = [bench.parse("eager"), bench.parse("eager:fp16")]
    found = bench.measure(smallest_bundle, chosen, QUICK, load=load)
    broken = row(found.document.as_dict(), "eager:fp16")
    assert broken["reason"].startswith("image: the image is NaN") and broken["status"] == "interrupted"
    assert broken["scopes"]["unet"]["timing"]["n"] == 1 and broken["scopes"]["image"]["timing"] is None


@pytest.mark.parametrize(("kind", "share"), [("cuda", 0.5), ("cpu", None)])
def test_the_share_of_the_peak_goes_by_the_device_and_not_by_its_description(smallest_bundle, kind, share):
    """TensorRT's description names the GPU and no "cuda"."""
    state = measuring.State(Bundle.open(smallest_bundle), [bench.parse("tensorrt")], QUICK)
    state.environment = {"device": "cuda", "peak_flop_per_s": {"float32": 1e12}}
    state.descriptions["tensorrt"], state.devices["tensorrt"] = "tensorrt 10.16, NVIDIA H200, profiles 512px", kind
    state.samples, state.flops = {"unet": {"tensorrt": [1.0]}}, {"unet": {"total": int(5e11)}}
    assert facts._scope(state, state.variants[0], "unet").peak_fraction == share


def test_what_failed_by_itself_says_why_and_does_not_fail_the_run(result, saved):
    broken = row(saved, "compile")
    assert broken["status"] == "not measured"
    assert broken["reason"] == "RuntimeError: InvalidCxxCompiler: No working C++ compiler found"
    assert broken["scopes"]["unet"]["timing"] is None
    assert row(saved, "eager")["scopes"]["unet"]["speedup"]["compile"] is None
    assert result.failed == ()


def test_what_was_asked_for_and_failed_fails_the_run(smallest_bundle):
    chosen, load = [bench.parse("eager"), bench.parse("compile")], loader({"compile": OSError("no g++")})
    found = bench.measure(smallest_bundle, chosen, QUICK, load=load)
    assert found.failed == ("compile",)


def test_an_interrupt_keeps_what_was_measured(smallest_bundle):
    def progress(stage, fraction):
        if stage.startswith("round 2"):
            raise KeyboardInterrupt

    settings = bench.BenchSettings(rounds=9, memory=False, steps=2)
    found = bench.measure(smallest_bundle, [bench.parse("eager")], settings, load=loader({}), progress=progress)
    data = found.document.as_dict()
    assert data["interrupted"] and row(data, "eager")["status"] == "interrupted"
    assert row(data, "eager")["scopes"]["image"]["timing"]["n"] == 2
    assert any("interrupted after 2 of 9" in note for note in data["notes"])
    printed(data)


@pytest.mark.parametrize("stage", ["reference", "starting"])
def test_an_early_interrupt_still_gives_a_document(smallest_bundle, stage, monkeypatch):
    def progress(name, fraction):
        if name.startswith(stage):
            raise KeyboardInterrupt

    if stage == "starting":
        monkeypatch.setattr(facts, "environment", lambda state: (_ for _ in ()).throw(KeyboardInterrupt))
    data = bench.measure(smallest_bundle, [bench.parse("eager")], QUICK, load=loader({}), progress=progress).document
    assert "not measured" in printed(data.as_dict())
    assert "<html" in as_page(json.loads(json.dumps(data.as_dict())))


def test_a_batch_that_would_be_split_is_refused(smallest_bundle):
    bundle = Bundle.open(smallest_bundle)
    work.check_batch(bundle, bench.BenchSettings(batch=4))
    with pytest.raises(UserError, match="outside profile"):
        work.check_batch(bundle, bench.BenchSettings(batch=5))


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"batch": 0}, {"seconds": 0.0}, {"prompts": (" ",)}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError):
        bench.BenchSettings(**wrong)


def test_every_variant_is_fed_the_same(smallest_bundle):
    bundle = Bundle.open(smallest_bundle)
    call = QUICK.call()
    one, _ = work.record(variants.load(bundle, bench.parse("eager")), call)
    two, _ = work.record(variants.load(bundle, bench.parse("onnxruntime")), call)
    for name in one:
        assert one[name].shapes == two[name].shapes and one[name].counts == two[name].counts
    np.testing.assert_array_equal(one["unet"].feeds[0]["sample"], two["unet"].feeds[0]["sample"])


def test_a_process_of_its_own(smallest_bundle, tmp_path):
    ballast = np.ones(60_000_000)  # a parent larger than the child must not show in the child's peak
    found = probing.probe(smallest_bundle, bench.parse("onnxruntime"), QUICK.call(), {"ACCEL_CACHE": str(tmp_path)})
    assert found.reason == "" and found.load_s > 0 and found.first_image_s > 0 and found.second_image_s > 0
    assert found.baseline_rss_bytes <= found.loaded_rss_bytes <= found.peak_rss_bytes < ballast.nbytes
    broken = probing.probe(tmp_path, bench.parse("onnxruntime"), QUICK.call(), {})
    assert "is not a bundle" in broken.reason and broken.load_s is None


def test_a_variant_that_kills_its_process_is_not_loaded_again(smallest_bundle, monkeypatch):
    crash = probing.Process(crashed="the process died of SIGSEGV", reason="the process died of SIGSEGV")
    monkeypatch.setattr(
        measuring,
        "probe",
        lambda path, variant, *_: crash if variant.name == "onnxruntime" else probing.Process(reason="skipped"),
    )
    settings = bench.BenchSettings(rounds=1, steps=2)
    found = bench.measure(
        smallest_bundle,
        [bench.parse("eager"), bench.parse("onnxruntime")],
        settings,
        load=loader({"onnxruntime": AssertionError("loaded")}),
    )
    assert row(found.document.as_dict(), "onnxruntime")["reason"] == "the process died of SIGSEGV"


def test_tables_say_not_measured_and_never_zero(saved):
    text = printed(saved)
    assert "compile: not measured: RuntimeError: InvalidCxxCompiler" in text
    assert [line.split()[0] for line in text.splitlines() if " ms " in line] == ["eager", "onnxruntime"]
    lines = [line for line in printed(saved, full=True).splitlines() if line.startswith("│ compile")]
    assert lines and all(re.search(r"\d", line) is None for line in lines)


def test_the_page_is_self_contained(saved, result):
    page = as_page(saved, result.images)
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page and "url(" not in page
    assert page.count("data:image/png;base64,") >= 2 * 2  # two prompts, from eager and from onnxruntime


def test_other_files_are_not_taken_for_results(tmp_path):
    for data in ([], {}, {"schema": "accel-bench/2", "rows": []}):
        with pytest.raises(UserError, match="not a benchmark result"):
            documents.check_schema(data, "x.json")
