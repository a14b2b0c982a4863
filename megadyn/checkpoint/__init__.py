"""Checkpoints: whole or nothing, verified, readable at any topology, free of pickles."""
