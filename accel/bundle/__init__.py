"""The bundle: a folder with a manifest (`accel.json`), ONNX graphs and weights. See docs/bundle.md."""

from .manifest import MANIFEST, SCHEMA, Bundle, Component, Manifest, is_bundle, seal

__all__ = ["MANIFEST", "SCHEMA", "Bundle", "Component", "Manifest", "is_bundle", "seal"]
