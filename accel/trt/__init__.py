"""What TensorRT needs around an engine: the library, engine files, the pre-flight, signatures, CUDA, scratch memory."""
