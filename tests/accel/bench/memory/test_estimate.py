"""What is predicted of memory: weights, activations, and the options that make a model fit."""

import json
from dataclasses import replace

import pytest
import torch

import accel
from accel.bench import parse, probe
from accel.bench.memory import estimate, graph, module, report
from accel.bench.memory.estimate import Call, Need, Part
from accel.bundle import Bundle
from accel.errors import UserError
from accel.pipeline import opened


def test_the_peak_of_a_module_is_what_lives_at_once():
    class Two(torch.nn.Module):
        def forward(self, x):
            return (x + 1).relu().reshape(-1)[:4] + torch.nn.functional.scaled_dot_product_attention(x, x, x).sum()

    x = torch.empty(1, 256, 64, device="meta")
    one = 256 * 64 * 4
    # x, x + 1 and its relu; scores of 256 x 256 would be four times that.
    assert 3 * one <= module.peak(Two(), {"x": x}) < 3.1 * one


def test_views_and_weights_are_not_counted_and_dtypes_are():
    layer = torch.nn.Linear(64, 64, bias=False, device="meta")
    x = torch.empty(32, 64, device="meta")
    assert module.peak(layer, {"input": x}) == 2 * x.nbytes
    assert module.peak(layer.half(), {"input": x.half()}) == x.nbytes
    assert module.largest_layer(torch.nn.Sequential(layer, torch.nn.Linear(64, 128, bias=False).half())) == 64 * 128 * 2


def test_weights_are_those_of_the_files_and_of_the_dtype(smallest_bundle):
    bundle = Bundle.open(smallest_bundle)
    plain = estimate.need(bundle, parse("eager"), Call())
    half = estimate.need(bundle, parse("eager:fp16"), Call())
    with accel.load(smallest_bundle, "eager", device="cpu") as pipe:
        for part in plain.parts:
            network = pipe.engines[part.name].module
            held = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
            assert held <= part.weights * 1.01 and part.weights <= held * 1.05
    for full, low in zip(plain.parts, half.parts, strict=True):
        assert low.weights == pytest.approx(full.weights / 2, rel=0.05)
        assert low.activations == pytest.approx(full.activations / 2, rel=0.2)
    onnx = estimate.need(bundle, parse("onnxruntime"), Call())
    assert [part.weights for part in onnx.parts] == [part.weights for part in plain.parts]
    unet = bundle.component("unet")
    sizes = estimate.sizes_of(bundle, unet, Call())
    assert {p.name: p.activations for p in onnx.parts}["unet"] == graph.peak(bundle, unet, sizes, "onnxruntime")


def test_a_pipeline_folder_is_predicted_as_its_bundle_is_and_nothing_is_loaded(smallest, smallest_bundle, monkeypatch):
    monkeypatch.setattr(type(opened(smallest)), "module", lambda *_: pytest.fail("weights were loaded"))
    folder = estimate.need(opened(smallest, safety_checker=False), parse("eager"), Call(1, 64, 64))
    bundle = estimate.need(Bundle.open(smallest_bundle), parse("eager"), Call(1, 64, 64))
    for ours, theirs in zip(folder.parts, bundle.parts, strict=True):
        assert ours.activations == theirs.activations and ours.weights == pytest.approx(theirs.weights, rel=0.02)
    with pytest.raises(UserError, match="runs ONNX graphs"):
        estimate.need(opened(smallest, safety_checker=False), parse("onnxruntime"), Call())


def test_more_images_and_pixels_take_more(smallest_bundle):
    bundle = Bundle.open(smallest_bundle)
    for engine in ("eager", "onnxruntime"):
        one, two, large = (
            {p.name: p.activations for p in estimate.need(bundle, parse(engine), call).parts}
            for call in (Call(1, 32, 32), Call(2, 32, 32), Call(1, 64, 64))
        )
        assert 1.5 * one["vae_decoder"] < two["vae_decoder"] <= 2.2 * one["vae_decoder"]
        assert large["vae_decoder"] > 3 * one["vae_decoder"] and large["unet"] > 2 * one["unet"]
    with pytest.raises(UserError, match="another --height or --width"):
        estimate.need(bundle, parse("eager"), Call(1, 128, 128))


def test_options_are_tried_in_turn_and_each_takes_less(smallest):
    bundle = opened(smallest, safety_checker=False)
    found = list(estimate.sparing(bundle, parse("eager"), Call(1, 1024, 1024)))
    assert [own.options for own in found] == [
        (),
        ("--text-encoder-precision fp16",),
        ("--precision fp16",),
        ("--precision fp16", "--vae-tiling"),
        ("--precision fp16", "--vae-tiling", "--offload model"),
        ("--precision fp16", "--vae-tiling", "--offload sequential"),
    ]
    peaks = [own.peak - own.itself for own in found]
    assert peaks == sorted(peaks, reverse=True)
    assert found[3].parts[-1].activations < found[2].parts[-1].activations / 3, "a quarter of the pixels"


def test_a_phase_holds_its_network_alone_with_offload():
    parts = (Part("text_encoder", 100, 1), Part("unet", 1000, 20, 50), Part("vae_decoder", 80, 500))
    whole = Need("eager", parts)
    assert (whole.weights, whole.peak) == (1180, 1680)
    model = replace(whole, resident=False)
    assert (model.weights, model.peak) == (1000, 1020)
    assert replace(whole, layer=50).peak == 550 and replace(model, itself=7).peak == 1027
    assert replace(whole, copies=2).peak == 100 + 2 * 1000 and replace(model, copies=2).peak == 2000


def test_what_fits_is_said(smallest_bundle, capsys):
    from accel.cli import main

    bundle = Bundle.open(smallest_bundle)
    plain = estimate.need(bundle, parse("eager"), Call())
    gb = (report.CONTEXT + plain.peak - plain.itself - 1) / 1e9  # a byte too small
    found = report.predicted(bundle, [parse("eager")], Call(), gb)
    assert found["fits"]["eager"]["fits"] and found["fits"]["eager"]["options"] == ["--text-encoder-precision fp16"]
    assert report.predicted(bundle, [parse("eager")], Call(), gb + 1)["fits"]["eager"]["options"] == []
    assert not report.predicted(bundle, [parse("eager")], Call(), 0.1)["fits"]["eager"]["fits"]
    assert main(["bench", str(smallest_bundle), "--memory-estimate", "--device-memory", str(gb)]) == 0
    said = capsys.readouterr().out
    assert "fits into" in said and "with --text-encoder-precision fp16" in said and "tensorrt" in said
    assert main(["bench", str(smallest_bundle), "--memory-estimate", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"][0]["peak_bytes"] == plain.peak
    assert main(["bench", str(smallest_bundle), "--device-memory", "8"]) == 1


@pytest.mark.slow
def test_the_prediction_is_near_a_real_process(sd15_bundle):
    """Small networks: what an engine takes by itself is most of it."""
    bundle = Bundle.open(sd15_bundle)
    done = probe.probe(bundle.path, parse("eager"), {"prompt": ["the cat"], "seed": 0, "steps": 2}, {})
    measured = done.peak_rss_bytes - done.baseline_rss_bytes
    assert estimate.need(bundle, parse("eager"), Call()).peak == pytest.approx(measured, rel=0.5)
