"""Datasets, from the files that they are published as to the batches of a training step."""
