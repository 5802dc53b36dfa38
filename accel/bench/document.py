"""The result of a benchmark as data: frozen records that become one JSON document, schema `accel-bench/1`.

In the document null means "not measured", and the row or the notes say why; infinity (the PSNR of equal images) is the
string "inf", because JSON has no word for it. Times are seconds, sizes bytes, rates per second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from ..errors import UserError, printable
from .probe import Process
from .timing import Ratio, Timing

SCHEMA = "accel-bench/1"
MEASURED, PARTLY, UNMEASURED = "measured", "interrupted", "not measured"


@dataclass(frozen=True, kw_only=True)
class Scope:
    """One component, or the whole image, on one variant.

    Attributes:
        timing: None where there are no samples.
        first_call_s: the first call in this process, with what it compiles.
        busy_s: on a GPU, seconds of the call in which kernels or copies ran there.
        images_per_s: batch over p50.
        flop_per_s: counted FLOPs over p50.
        peak_fraction: of the matrix rate this machine measured for the variant's dtype, 0..1.
        speedup: against each eager and compile variant of the run, by name.
    """

    timing: Timing | None = None
    first_call_s: float | None = None
    busy_s: float | None = None
    images_per_s: float | None = None
    flop_per_s: float | None = None
    peak_fraction: float | None = None
    speedup: Mapping[str, Ratio | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant.

    Attributes:
        variant: its name.
        dtype: what the UNet computes in.
        asked: whether the user named it.
        description: the engine's own words for what ran.
        status: "measured", "interrupted" (some samples are missing) or "not measured".
        reason: why it is not measured, or not completely.
        scopes: by component, and "image".
        process: one image in a fresh process.
        parity: `unet` and `image` against eager in float32; the image in units of 1/255.
        image_sha256: of the pixels as uint8.
    """

    variant: str
    engine: str
    dtype: str
    asked: bool
    description: str
    status: str
    reason: str
    scopes: Mapping[str, Scope]
    process: Process
    parity: Mapping[str, Mapping[str, Any] | None]
    image_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What a difference of zero looks like: `what` against eager in float32, measured as `Row.parity` is."""

    what: str
    parity: Mapping[str, Mapping[str, Any] | None]
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Document:
    """Everything that one run of `accel bench` measured.

    Attributes:
        created: UTC, ISO 8601.
        command: the command line, without paths.
        interrupted: whether the user stopped it.
        bundle, work, environment: what was measured, on what work, on what machine.
        rows: one per variant.
        noise_floor: what rounding and repetition alone do.
        notes: what a reader has to know to judge the numbers.
    """

    created: str
    accel: str
    command: str
    interrupted: bool
    bundle: Mapping[str, Any]
    work: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: tuple[Row, ...]
    noise_floor: tuple[Floor, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | plain(self)


def plain(value: Any) -> Any:
    """Records, tuples and non-finite floats as what JSON has."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def check_schema(data: Any, name: str) -> dict[str, Any]:
    """A saved document, after making sure that this version can read it.

    Raises:
        UserError: when it is something else.
    """
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA or not isinstance(data.get("rows"), list):
        raise UserError(
            f"{name} is not a benchmark result that this version reads (schema {schema!r}, not {SCHEMA!r})",
            "give a file that `accel bench --json FILE` wrote",
        )
    return _shown(data)


def _shown(value: Any) -> Any:
    """The same with every text as a terminal may show it."""
    if isinstance(value, dict):
        return {printable(key): _shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return printable(value) if isinstance(value, str) else value
