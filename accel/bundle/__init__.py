"""The bundle: a folder with a manifest (`accel.json`), ONNX graphs and weights. See docs/bundle.md."""

from .manifest import MANIFEST, SCHEMA, Bundle, Component, Manifest, finalize, is_bundle

__all__ = ["MANIFEST", "SCHEMA", "Bundle", "Component", "Manifest", "finalize", "is_bundle", "seal"]

seal = finalize  # its name in 0.1
