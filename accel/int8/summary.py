"""What the export measured about int8, in words: one text for the command line, the inspection and the report."""

from __future__ import annotations

from ..bundle import Component


def lines(component: Component) -> list[str]:
    """What the export measured about an int8 component, one line per engine; for a float one, why it is not int8."""
    if reason := component.parity.get("int8_tried", {}).get("reason"):
        return [f"not int8: {reason}"]
    verdict = component.int8.get("verdict", {})
    if not verdict:
        return []
    parity, audits = verdict["parity"], component.int8.get("audit", {})
    lines = [
        f"int8: {len(component.int8['layers'])} layers, ranges {component.int8['calibration']['ranges']}; images "
        f"{parity['psnr']:.1f} dB from float32's (budget {parity['budget']:g}{'' if parity['ok'] else ': NOT MET'})"
    ]
    if not verdict["engines"]:
        lines.append("speed was not measured: TensorRT, which int8 with float16 is made for, cannot run here")
    for engine, entry in verdict["engines"].items():
        if "error" in entry:
            lines.append(f"{engine}: {entry['error']}")
            continue
        audit, share = audits.get(engine), "not audited"
        if audit:
            share = f"{audit['share']:.0%} of the layers run in int8" + ("" if audit["ok"] else ", TOO FEW")
        lines.append(
            f"{engine}: {entry['float_seconds'] * 1e3:.1f} ms in {verdict.get('against', 'float32')}, "
            f"{entry['int8_seconds'] * 1e3:.1f} ms in int8 ({entry['speedup']:.2f}x); {share}"
            + ("" if engine in verdict["offered"] else "; auto does not choose it")
        )
    return lines
