"""Endless video over WebSocket and HTTP, and the page that shows it; `python -m sf_jax.serve`."""
