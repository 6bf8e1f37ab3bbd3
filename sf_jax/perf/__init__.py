"""Ahead-of-time compilation for devices that are not attached, and analysis of the compiled programs."""
