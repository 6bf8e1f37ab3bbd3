"""Endless video over WebSocket and HTTP, with a web page that plays it; `python -m sf_jax.serve`."""
