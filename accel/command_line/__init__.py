"""What every verb of the command line shares: the parser with our errors, and options with one name for one meaning."""
