"""Which components are int8 is decided by measurements alone: no bundle is needed to say how."""

import pytest

from accel.export.int8.acceptance import accept
from accel.export.int8.settings import Int8Settings


def measured(psnr: float = 40.0, ok: bool = True, audited: bool = True, **faster: bool) -> dict:
    return {
        "parity": {"psnr": psnr, "ok": ok},
        "engines": {engine: {"faster": is_so} for engine, is_so in faster.items()},
        "audit": {engine: {"ok": audited} for engine in faster},
    }


AUTO, REQUIRED = Int8Settings(precision="auto"), Int8Settings(precision="int8")


def test_parity_decides_before_speed_is_measured():
    assert accept("vae_decoder", {"parity": {"psnr": 21.0, "ok": True}}, AUTO).accepted
    decision = accept("vae_decoder", {"parity": {"psnr": 19.0, "ok": False}}, AUTO)
    assert decision.reason == "outside the parity budget of 20 dB (19.0 dB)" and not decision.accepted
    assert "budget of 30 dB" in accept("unet", measured(ok=False), Int8Settings(precision="auto", budget=30.0)).reason


def test_parity_decides_where_no_engine_can_run():
    decision = accept("vae_decoder", measured(), AUTO)
    assert decision.accepted and decision.measurements["enabled_engines"] == []


def test_one_engine_on_which_int8_is_faster_is_enough():
    decision = accept("vae_decoder", measured(onnxruntime=False, openvino=True), AUTO)
    assert decision.accepted and decision.measurements["enabled_engines"] == ["openvino"]
    assert accept("vae_decoder", measured(onnxruntime=False), AUTO).reason == "int8 is not faster on this machine"


def test_an_engine_that_fails_the_audit_or_failed_to_run_is_not_enabled():
    assert not accept("unet", measured(audited=False, onnxruntime=True), AUTO).accepted
    failed = measured() | {"engines": {"openvino": {"error": "no such CPU", "faster": False}}}
    assert not accept("unet", failed, AUTO).accepted


@pytest.mark.parametrize("measurements", [measured(ok=False, openvino=True), measured(openvino=False)])
def test_a_required_unet_is_int8_whatever_it_is_worth_but_no_engine_is_enabled(measurements):
    decision = accept("unet", measurements, REQUIRED)
    assert decision.accepted and decision.measurements["enabled_engines"] == []
    assert not accept("unet", measurements, AUTO).accepted
    assert not accept("text_encoder", measurements, REQUIRED).accepted, "only the UNet is required"
    assert not accept("unet", measurements, Int8Settings(components=("vae_decoder",))).accepted


def test_the_second_text_encoder_goes_with_the_first():
    assert Int8Settings(components=("text_encoder",)).wants("text_encoder_2")
    assert not Int8Settings(components=("unet",)).wants("text_encoder_2")


def test_the_old_spelling_of_an_option_is_read_with_a_note():
    import argparse

    from accel.commands import export
    from accel.errors import Notice

    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    with pytest.warns(Notice, match="--collector is now --int8-observer"):
        old = parser.parse_args(["model", "out", "--collector", "max"])
    assert old == parser.parse_args(["model", "out", "--int8-observer", "max"])
    assert "--collector" not in parser.format_help()
