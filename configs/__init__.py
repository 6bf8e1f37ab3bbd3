"""Configs for `python -m sf_jax.train --config=configs/NAME.py:VARIANT`."""
