"""Kernels for the eager path. Export never sees them."""
