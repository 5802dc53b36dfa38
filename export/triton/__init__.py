"""A model repository of a bundle for NVIDIA Triton Inference Server."""
