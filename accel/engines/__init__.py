"""One interface, one file per engine. Nothing heavy is imported until an engine is loaded."""

from .base import Engine, Status
from .select import ENGINES, choose, fitting_engine_file, load_engine, status

__all__ = ["ENGINES", "Engine", "Status", "choose", "fitting_engine_file", "load_engine", "status"]
