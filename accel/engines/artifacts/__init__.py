"""What torch.compile made on this machine, kept from one process to the next."""
