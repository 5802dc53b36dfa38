"""EDM (Karras et al. 2022): preconditioning, sampler, and published checkpoints."""
