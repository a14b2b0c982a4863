"""From text to token ids: the reference tokenizer, and gigatoken where it is proven to agree. No torch in here."""
