"""Image quality by named protocols: FID, CLIP score, prompt accuracy."""
