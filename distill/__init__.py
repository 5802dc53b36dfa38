"""Training: small students, few-step students, and the digits model that ships with the package."""
