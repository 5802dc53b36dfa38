"""int8 for torch: fake-quantized modules, observers, and the packed form. Importing this package loads no torch."""
