"""One text about an int8 component for the command line, `accel inspect` and the benchmark report."""

from __future__ import annotations

from ..bundle import Component
from ..machine import machine
from .formats import FORMATS, of_layer

# A UNet with fewer parameters gains nothing (digits has 2.5 million), one with more does (SD-Tiny: 323 million).
_WIDE = 50_000_000
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


def lines(component: Component) -> list[str]:
    """What the export measured: one line on parity, one per engine; for a float component, why int8 was rejected."""
    tried = component.parity.get("int8_tried", {})
    if reason := tried.get("reason"):
        return [f"not {tried.get('format', 'int8')}: {reason}"]
    acceptance = component.int8.get("acceptance", {})
    if not acceptance:
        return []
    parity, audits, form = acceptance["parity"], component.int8.get("audit", {}), FORMATS[component.format]
    ran = "of the layers run in" if form.activations else "of the layers keep their weights in"
    layers, ranges = component.int8["layers"], component.int8["calibration"]["ranges"]
    other = sum(of_layer(own)[0] is not form for own in layers.values())
    lines = [
        f"{form.name}: {len(layers)} layers{f' ({other} of them in int8)' if other else ''}, ranges {ranges}; images "
        f"{parity['psnr']:.1f} dB from float32's (budget {parity['budget']:g}{'' if parity['ok'] else ': NOT MET'})"
    ]
    if not acceptance["engines"]:
        lines.append(f"speed was not measured: TensorRT, which {form.name} with float16 is made for, cannot run here")
    for engine, entry in acceptance["engines"].items():
        if "error" in entry:
            lines.append(f"{engine}: {entry['error']}")
            continue
        audit, share = audits.get(engine), "not audited"
        if audit:
            share = f"{audit['share']:.0%} {ran} {form.name}" + ("" if audit["ok"] else ", TOO FEW")
        lines.append(
            f"{engine}: {entry['float_seconds'] * 1e3:.1f} ms in {acceptance.get('against', 'float32')}, "
            f"{entry['int8_seconds'] * 1e3:.1f} ms in {form.name} ({entry['speedup']:.2f}x); {share}"
            + ("" if engine in acceptance["enabled_engines"] else "; auto does not choose it")
        )
    return lines


def prospect(unet: Component) -> str:
    """What int8 would bring a float32 UNet on this machine, in a line; empty where that is not known."""
    if unet.int8 or unet.parameters < _WIDE:
        return ""
    if _VNNI & set(machine().isa):
        # benchmarks/peers.json, SD-Tiny at 256 px: 4.71 to 1.76 s on OpenVINO.
        return (
            "--precision int8 would be about 2.7 times as fast on a processor such as this one, if the images allow it"
        )
    if "avx2" in machine().isa:
        return "--precision int8 would make it a quarter of the size; this processor has no VNNI, so hardly faster"
    return ""
