"""ONNX Runtime's execution providers: those that are built into it, and plugin libraries that it loads at run time."""
