"""Eager against compiled: speed, memory and parity of every engine on one bundle, in one interleaved run."""

from __future__ import annotations

from .document import SCHEMA, Document, check_schema
from .measure import Result, measure
from .variants import Variant, chosen, parse
from .work import BenchSettings

__all__ = ["SCHEMA", "Document", "Result", "BenchSettings", "Variant", "check_schema", "chosen", "measure", "parse"]
