"""Losses as pure functions of parameters, batch and noise."""
