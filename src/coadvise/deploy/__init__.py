"""A finished run in use: predictions, and files for other programs."""
