"""Calibrate int8, measure it, accept or reject it per component, and audit what an engine really runs."""
