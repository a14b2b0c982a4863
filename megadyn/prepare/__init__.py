"""From text to a dataset: find, read, tokenize in many processes, join. No torch in here."""
