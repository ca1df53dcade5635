"""From files to batches: sources find images, the scan reads them, views vary them, the loader hands them out."""
