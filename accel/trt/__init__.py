"""TensorRT around the engine: the library, engine files, their pre-flight checks and who may be trusted."""
