"""`accel.push`: a bundle goes to the Hugging Face hub, with a card that its manifest writes."""

from .upload import Pushed, push

__all__ = ["Pushed", "push"]
