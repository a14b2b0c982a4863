"""From a dataset to batches, in numpy and files: read, cut into samples, blend, batch. No torch in here."""
