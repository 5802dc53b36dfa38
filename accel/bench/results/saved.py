"""Results of earlier runs: read from a JSON document, or out of the page that was made of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import parse_json, read_bytes
from .. import report
from ..document import check_schema
from .verdict import sentence

_LIMIT = 1 << 30
_EMBEDDED = re.compile(rb'<script type="application/json" id="document">(.*?)</script>', re.DOTALL)


def read(name: str) -> dict[str, Any]:
    """A document of schema accel-bench/1, from a .json file or a page of one run.

    Raises:
        UserError: for a file that is not there, something else, or a document in which a field is missing.
    """
    path, fix = Path(name), "give a .json or .html file that `accel bench MODEL --out FILE` wrote"
    if not path.is_file():
        raise UserError(f"the benchmark result is missing: {name}", fix)
    if path.suffix == ".html":
        found = _EMBEDDED.search(read_bytes(path, "the page", _LIMIT))
        if found is None:
            raise UserError(f"{name} carries no benchmark result", fix)
        text = found[1]
    else:
        text = read_bytes(path, "the benchmark result", _LIMIT)
    try:
        data: Any = parse_json(text)
    except ValueError as error:
        raise UserError(f"{name} is not a benchmark result, or is damaged ({error})", fix) from None
    document = check_schema(data, name)
    try:  # a file from anywhere: all that the reports read must be in it
        from ..page import page

        page(document), [*report.tables(document)], report.headline(document), sentence(document)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        why = f"{name} is damaged ({type(error).__name__}: {error})"
        raise UserError(why, fix) from None
    return document
