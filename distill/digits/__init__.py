"""Train the digits model that ships with the package, from nothing."""
