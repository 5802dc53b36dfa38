"""IP-Adapter (arXiv 2308.06721): a picture as a prompt, beside the words."""
