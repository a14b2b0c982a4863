"""Routing: which tokens a layer processes, in training and in generation (mathematics: docs in each file)."""
