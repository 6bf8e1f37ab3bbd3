"""Datasets and input pipelines: clips with captions in, batches of numpy arrays out."""
