"""Build TensorRT engines from the graphs of a bundle, and audit what they compute in."""
