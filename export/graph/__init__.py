"""torch modules to checked ONNX graphs: tracing, dtypes, fp32 fallback blocks, structural checks."""
