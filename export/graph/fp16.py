"""Convert one component of a float32 bundle to float16: the baseline for int8 on GPUs, and what is not int8 there."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from accel.bundle import Bundle, Component
from accel.engines import load_engine
from accel.models import networks
from accel.models.networks import Network

from . import component


def write(bundle: Bundle, name: str, folder: Path) -> Component:
    """Write one component to `folder`, in float16 wherever its activations fit (`precision.choose`).

    Raises:
        UserError: when the graph differs from torch by more than the limit.
    """
    started = time.perf_counter()
    engine = load_engine(bundle, name, "eager", device="cpu", verify=False)
    record, manifest = engine.component, bundle.manifest
    network = Network(name, record.kind, engine.module, record.inputs, record.outputs)
    reference = component.reference_of(
        network, record.dims, "fp16", family=manifest.family, scaling_factor=manifest.pipeline["scaling_factor"]
    )
    folder.mkdir(parents=True)
    networks.save_config(network, folder)
    made = component.write(
        network, reference, record.dims, folder, opset=manifest.exporter["opset"], step=lambda stage, done: None
    )
    return replace(made, parity=made.parity | {"export_seconds": round(time.perf_counter() - started, 2)})
