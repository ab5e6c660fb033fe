"""Activations on disk: the Zarr layout, writing, reading, shuffling, batches."""
