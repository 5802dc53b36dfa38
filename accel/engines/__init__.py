"""One interface, one file per engine. Nothing heavy is imported until an engine is loaded."""

from .base import Engine, Facts, Status
from .select import ENGINES, choose, computing_in, engine_file_engines, facts, fitting_engine_file, load_engine, status

__all__ = [
    "ENGINES",
    "Engine",
    "Facts",
    "Status",
    "choose",
    "computing_in",
    "facts",
    "engine_file_engines",
    "fitting_engine_file",
    "load_engine",
    "status",
]
