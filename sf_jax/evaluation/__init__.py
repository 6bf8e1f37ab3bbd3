"""A judge of generated clips, figures computed with it, and their report."""
