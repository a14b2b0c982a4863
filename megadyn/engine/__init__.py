"""Runs the model under DeepSpeed: pipeline stages, optimizer, and per-step measurements."""
