"""What an image looks like before it is done."""

from .previewer import Previewer, preview_hook, shown

__all__ = ["Previewer", "preview_hook", "shown"]
