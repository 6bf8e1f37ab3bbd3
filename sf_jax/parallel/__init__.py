"""How parameters and videos are spread over devices; `models/partition.py` has the activations."""
