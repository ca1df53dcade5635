"""Using a finished run: predictions, and files for other programs."""
