"""Models on disk, scored in one process."""
