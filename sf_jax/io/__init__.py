"""Reads users' videos and images, and writes files that common players support."""
