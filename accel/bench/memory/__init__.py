"""What a model will take in memory, before anything of it is loaded. Importing this package loads no torch."""
