"""Files of prompts or captions, for calibration and for evaluation: .txt, .csv or .jsonl."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..files import parse_json, read_bytes

COLUMNS = ("caption", "text", "prompt")
_FIX = "give a .txt with one prompt per line, a .csv with a heading, or a .jsonl with a text in each line"


def read_prompts(path: Path, *, refuse_blank: bool = False) -> list[str]:
    """The prompts of a file, in order, without the white space around them.

    Args:
        path: UTF-8. In a .csv, a heading and then rows: the column called caption, text or prompt, else the second one.
            In a .jsonl an object per line with one of these keys. In anything else one prompt per line.
        refuse_blank: refuse an empty prompt instead of leaving it out: what belongs to each line would shift.

    Raises:
        UserError: for a file that cannot be read or has no prompts, and for a line that is refused, naming it.
    """
    try:
        text = read_bytes(path, "the file of prompts", 64 << 20).decode("utf-8-sig")
    except UserError as error:
        raise UserError(f"the prompts {path} cannot be read: {error.message}", _FIX) from None
    except UnicodeDecodeError as error:
        raise UserError(f"the prompts {path} cannot be read: they are not UTF-8 ({error.reason})", _FIX) from None
    read = {".csv": _csv, ".jsonl": _jsonl}.get(path.suffix.lower(), _lines)
    numbered = [(line, prompt.strip()) for line, prompt in read(text, path)]
    for line, prompt in numbered:
        if refuse_blank and not prompt:
            raise UserError(f"{path}, line {line}: the prompt is empty", "remove the line or put a prompt there")
    if not (prompts := [prompt for _, prompt in numbered if prompt]):
        raise UserError(f"{path} has no prompts in it", _FIX)
    return prompts


def _lines(text: str, path: Path) -> Iterator[tuple[int, str]]:
    return enumerate(text.splitlines(), 1)


def _csv(text: str, path: Path) -> Iterator[tuple[int, str]]:
    reader = csv.reader(text.splitlines(keepends=True))
    heading = [cell.strip().lower() for cell in next(reader, [])]
    column = next((heading.index(name) for name in COLUMNS if name in heading), 1)
    if len(heading) <= column:
        raise UserError(f"{path} has no column of prompts", _FIX)
    return ((reader.line_num, row[column] if column < len(row) else "") for row in reader if row)


def _jsonl(text: str, path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
            yield number, next(entry[key] for key in COLUMNS if isinstance(entry.get(key), str))
        except (ValueError, StopIteration, AttributeError):
            raise UserError(f"line {number} of {path} has no text, prompt or caption", _FIX) from None
