"""From trained weights to video files."""
