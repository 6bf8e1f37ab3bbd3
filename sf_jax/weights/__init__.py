"""Readers, writers and name maps of weight files."""
