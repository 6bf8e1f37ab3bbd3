"""What a program will need on devices that are absent: compiled for them here, and read."""
