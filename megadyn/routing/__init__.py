"""Routing: which tokens a layer processes, in training and in generation. The mathematics is in each file's docstring."""
