"""Train the emoji model, a small Stable Diffusion in colour, from nothing."""
