"""Sharding of parameters and videos over devices; `models/partition.py` shards the activations."""
