"""CLIP's tokenizer of ONNX Runtime Extensions in the graph, so that text is the input."""
