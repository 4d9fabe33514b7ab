"""Photos in, scene out: cameras, depth and points from one feed-forward transformer."""

__version__ = "0.1.0"
