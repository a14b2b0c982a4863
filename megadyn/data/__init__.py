"""From a dataset to batches with numpy: read, cut into samples, blend, batch. No torch in here."""
