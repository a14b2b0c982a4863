"""Measures speed and size and prints tables. These are not tests: nothing here passes or fails."""
