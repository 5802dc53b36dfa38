"""Build TensorRT engine files of a bundle and audit them."""
