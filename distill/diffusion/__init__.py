"""The forward process, denoising and losses, in the notation of the papers."""
