"""Training: small students, few-step students, and the digits model that ships with the package.

    from pathlib import Path
    from accel.distill import changed, execute, recipe

    execute(changed(recipe("digits_tiny"), model="digits", data="digits"), Path("my-tiny"))

`accel distill METHOD` is the same on the command line. The public names are resolved on first use.
"""

from typing import TYPE_CHECKING

from accel import _lazy_names

if TYPE_CHECKING:
    from .recipes import changed as changed
    from .registry import recipe as recipe
    from .run import execute as execute
    from .settings import Recipe as Recipe

_LAZY = {
    "execute": "accel.distill.run",
    "recipe": "accel.distill.registry",
    "changed": "accel.distill.recipes",
    "Recipe": "accel.distill.settings",
}
__getattr__, __dir__ = _lazy_names(__name__, _LAZY)

__all__ = [*_LAZY]
