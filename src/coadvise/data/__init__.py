"""Pictures to batches: sources list them, the scan decodes them once, views augment them, the loader makes batches."""
