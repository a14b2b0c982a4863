"""What drives a run: data, length, and the rules of its steps."""
