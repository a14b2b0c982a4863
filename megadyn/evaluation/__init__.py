"""Opens saved models and scores them in one process."""
