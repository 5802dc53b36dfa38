"""Few-step students: DMD2 for text and classes, its critic, LCM, and regression on ODE pairs."""
