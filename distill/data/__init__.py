"""From images to training batches: crops, cached latents and embeddings, random numbers, processes."""
