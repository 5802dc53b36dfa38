"""Verbs that give a bundle to others."""
