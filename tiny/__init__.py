"""The miniature: a small world in real formats, and the script that makes it."""
