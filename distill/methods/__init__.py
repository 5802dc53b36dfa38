"""Training methods but the few-step ones: distillation into small students, LoRA, DreamBooth, tiny VAE, QAT."""
