"""Verbs that measure on this machine."""
