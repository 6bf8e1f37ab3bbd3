"""A judge of generated clips, metrics computed with it, and their report."""
