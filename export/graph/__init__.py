"""torch modules to checked ONNX graphs: tracing, precision, fp32 fallback blocks, structural checks."""
