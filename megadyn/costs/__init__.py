"""Costs of the pieces of a transformer layer in closed form, which `kinds/` and `planning/` add up. No torch."""
