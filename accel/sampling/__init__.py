"""Noise schedules, initial noise and samplers as pure functions on numpy arrays."""
