"""What benchmark documents say: one in a sentence, several compared with each other."""
