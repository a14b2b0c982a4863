"""From text to batches, in numpy and files: read, tokenize, store, cut into samples, batch. No torch in here."""
