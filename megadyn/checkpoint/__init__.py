"""Checkpoints: written atomically, verified, readable under any topology, free of pickles."""
