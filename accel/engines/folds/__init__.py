"""Exact algebra on a graph that an engine applies when it loads it."""
