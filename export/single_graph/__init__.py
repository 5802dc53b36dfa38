"""Text to pixels in one ONNX graph: encoder, noise, the sampler's steps, decoder."""
