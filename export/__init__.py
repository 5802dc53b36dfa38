"""Pipelines to bundles: ONNX export, precision, and what must be checked before an export counts."""
