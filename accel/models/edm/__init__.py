"""Models of the EDM family as folders, and their network with named tensors."""
