"""The model under DeepSpeed: stages, optimizer, and what a step measures of itself."""
