"""EDM's noise levels, preconditioning constants and solvers (Karras et al. 2022), on numpy and torch arrays alike."""
