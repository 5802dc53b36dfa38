"""A server whose models are replicas in a Ray cluster."""
