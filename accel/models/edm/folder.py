"""Which folder is a model of the EDM family. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...files import read_json

PIPELINE = "EDMPipeline"  # in model_index.json


def is_edm(model: Any) -> bool:
    """Whether a model is the folder of an EDM model."""
    if not isinstance(model, (str, Path)):
        return False
    index = Path(model) / "model_index.json"
    found = read_json(index, "model_index.json") if index.is_file() else None
    return isinstance(found, dict) and found.get("_class_name") == PIPELINE
