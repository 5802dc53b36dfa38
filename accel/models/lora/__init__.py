"""LoRA files, of every kind that is fused into weights: read, fused, and kept for the engines that run with them."""

from .files import COMPONENTS, WEIGHT_NAME, LoraFile, lora_file, lora_files
from .fuse import fuse
from .reading import check_components, made_for, read

__all__ = [
    "COMPONENTS",
    "WEIGHT_NAME",
    "LoraFile",
    "check_components",
    "fuse",
    "lora_file",
    "lora_files",
    "made_for",
    "read",
]
