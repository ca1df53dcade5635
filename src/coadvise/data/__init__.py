"""From files to batches: sources find images, the audit reads them, views vary them, the loader hands them out."""
