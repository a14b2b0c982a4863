"""Everything that drives a run: data, length, and the rules about its steps."""
