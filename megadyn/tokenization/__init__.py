"""From text to token ids: the reference tokenizer, and gigatoken if it is proved to agree. No torch in here."""
