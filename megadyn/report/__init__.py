"""Writes one HTML page per run about the contents of its output folder."""
