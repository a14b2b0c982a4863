"""What a run costs, without running it."""
