"""Few-step students: DMD2 for text and classes, its critic, and regression on ODE pairs."""
