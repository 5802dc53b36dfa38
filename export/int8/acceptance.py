"""What stays int8: the verdict on each component, and float in its place where int8 does not pay."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel.bundle import MANIFEST, Bundle, Component, finalize
from accel.trt import engine_files

from ..graph import fp16
from . import speed
from .settings import Settings


def decide(
    folder: Path,
    bundle: Bundle,
    records: dict[str, Component],
    found: Mapping[str, dict],
    settings: Settings,
    scratch: Path,
    progress: Callable[[str, float], None],
) -> list[Bundle]:
    """Write each verdict into its record; where int8 does not pay, put the float network back.

    Where none of the engines that it is made for can run here, parity alone decides, and the verdict has no speeds.

    Returns:
        The int8 components as they were measured, with TensorRT's engine files where there are any.
    """
    engines, raced = speed.engines_for(settings.dtype), []
    for entry, record in list(records.items()):
        if not record.int8:
            continue
        low, high = Bundle.open(folder), bundle
        if "tensorrt" in engines:  # it leaves engine files in the bundles
            low = _alone(low, entry, scratch / f"{entry}-int8")
            other = _halved if settings.dtype != "float32" else _alone
            high = other(bundle, entry, scratch / f"{entry}-float")
        raced.append(low)
        said = speed.judge(
            low, high, entry, found[entry], engines, threads=settings.threads, say=lambda text: progress(text, 0.85)
        )
        audits = said.pop("audit")
        if said["offered"] or not engines or (settings.strict and entry == "unet"):
            records[entry] = replace(record, int8=dict(record.int8) | {"audit": audits, "verdict": said})
            continue
        shutil.rmtree(folder / entry)
        shutil.copytree(high.path / entry, folder / entry)
        records[entry] = high.component(entry)
        stay(records, entry, "int8 is not faster on this machine", said)
    return raced


def keep_engine_files(raced: Sequence[Bundle], records: Mapping[str, Component], folder: Path) -> None:
    """Engine files of components that are offered on TensorRT: they took minutes to build, and fit what was sealed."""
    for engine_file in (engine_file for bundle in raced for engine_file in engine_files.find(bundle)):
        offered = records[engine_file.component].int8.get("verdict", {}).get("offered", ())
        if "tensorrt" in offered:
            shutil.copytree(engine_file.path.parent, folder / engine_files.FOLDER / engine_file.key, dirs_exist_ok=True)


def stay(records: dict[str, Component], entry: str, reason: str, measured: Mapping[str, Any]) -> None:
    """Note in a float component's record why it is not int8, beside the reason for the precision that it has."""
    record = records[entry]
    records[entry] = replace(record, parity=dict(record.parity) | {"int8_tried": {"reason": reason} | dict(measured)})


def _halved(bundle: Bundle, entry: str, folder: Path) -> Bundle:
    """A bundle of one component, in float16."""
    made = fp16.write(bundle, entry, folder / entry)
    finalize(folder, replace(bundle.manifest, precision="fp16", components={entry: made}))
    return Bundle.open(folder)


def _alone(bundle: Bundle, entry: str, folder: Path) -> Bundle:
    """One component of a bundle, copied: ONNX's own loader refuses weights that are links."""
    folder.mkdir(parents=True)
    shutil.copyfile(bundle.path / MANIFEST, folder / MANIFEST)
    shutil.copytree(bundle.path / entry, folder / entry)
    return Bundle.open(folder)
