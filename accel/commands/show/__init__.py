"""Verbs that show what others measured or draw."""
